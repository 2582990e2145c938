"""What Based and Aaren cost: time per token at 1k and 16k tokens, bytes of state, and Aaren's step against a softmax.

Run alone on the machine: `python benchmarks/mixers.py`. Every ratio is of two things measured in turn in this run.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from regard.evidence.mixer_bench import MixerBench, find_mixers
from regard.evidence.mixer_measurements import cost
from regard.evidence.store import write_json
from regard.paper import Run
from regard.papers.aaren import AarenAttention

DIM, HEADS, ROUNDS = 128, 4, 5
LENGTHS = (1024, 16384)
STREAM_LENGTHS, STEPS = (512, 1024, 4096), 200
RESULTS = Path(__file__).parent / "results" / "mixers.json"


def costs() -> list[dict]:
    """Time per token at both lengths, the median of rounds in which the lengths take turns, and bytes of state."""
    run, rows = Run(seed=0, workdir=RESULTS.parent), []
    for name, maker in find_mixers(MixerBench(only=("based", "aaren", "softmax"), dim=DIM)).items():
        rounds = [[cost(maker, DIM, length, run) for length in LENGTHS] for _ in range(ROUNDS)]
        short, long = ([measured[at] for measured in rounds] for at in range(2))
        rows.append(
            {
                "mixer": name,
                "read_us_1k": 1e6 * median(c.forward for c in short),
                "read_us_16k": 1e6 * median(c.forward for c in long),
                "read_ratio": median(b.forward / a.forward for a, b in zip(short, long, strict=True)),
                "decode_ratio": median(b.decode / a.decode for a, b in zip(short, long, strict=True)),
                "state_bytes_1k": short[0].state_bytes,
                "state_bytes_16k": long[0].state_bytes,
            }
        )
    return rows


@torch.no_grad()
def stream(tokens: int) -> dict:
    """Time for one more token after so many: Aaren's update, and the same by a softmax over all keys again.

    The softmax keeps projected keys and values in a buffer and its projected query, so that only what must be done
    again is done again. A second one, which keeps the tokens only, projects them again too.
    """
    torch.manual_seed(0)
    mixer = AarenAttention(DIM, HEADS).eval()
    attn, head_dim = mixer.attn, DIM // HEADS
    query = attn.q_proj(mixer.query).view(1, HEADS, 1, head_dim) * head_dim**-0.5
    x = torch.randn(1, tokens + STEPS, DIM)
    _, state = mixer(x[:, :tokens])
    keys, values = attn.heads(attn.k_proj(x)).contiguous(), attn.heads(attn.v_proj(x)).contiguous()

    def read(k: Tensor, v: Tensor) -> Tensor:
        return attn.out_proj((F.softmax(query @ k.mT, dim=-1) @ v).transpose(1, 2).flatten(2))

    def update(at: int) -> Tensor:
        nonlocal state
        out, state = mixer(x[:, at : at + 1], state)
        return out

    def softmax(at: int) -> Tensor:
        token = x[:, at : at + 1]
        keys[:, :, at] = attn.heads(attn.k_proj(token))[:, :, 0]
        values[:, :, at] = attn.heads(attn.v_proj(token))[:, :, 0]
        return read(keys[:, :, : at + 1], values[:, :, : at + 1])

    def softmax_from_tokens(at: int) -> Tensor:
        seen = x[:, : at + 1]
        return read(attn.heads(attn.k_proj(seen)), attn.heads(attn.v_proj(seen)))

    ways: dict[str, Callable[[int], Tensor]] = {
        "aaren": update,
        "softmax": softmax,
        "softmax_from_tokens": softmax_from_tokens,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(tokens, tokens + STEPS):
        outs = []
        for name, way in ways.items():
            start = time.perf_counter()
            outs.append(way(at))
            times[name].append(time.perf_counter() - start)
        assert all(torch.allclose(outs[0], other, atol=1e-5) for other in outs[1:])
    us = {f"{name}_us": 1e6 * median(seconds) for name, seconds in times.items()}
    return {"tokens": tokens, **us, "softmax_over_aaren": us["softmax_us"] / us["aaren_us"]}


def show(title: str, rows: list[dict]) -> None:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    results = {
        "threads": torch.get_num_threads(),
        "dim": DIM,
        "heads": HEADS,
        "costs": costs(),
        "streams": list(map(stream, STREAM_LENGTHS)),
    }
    show("One layer, one sequence", results["costs"])
    show("One more token after so many", results["streams"])
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
