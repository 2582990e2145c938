"""What `attend` costs over PyTorch's kernel, and what it saves where a window hides most of the keys.

Run alone on the machine: `python benchmarks/attention.py`. The two sides of a ratio take turns, call by call, and the
ratio is the median of those of all rounds.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.attention.attend import attend
from regard.attention.masks import causal, window
from regard.evidence.store import write_json
from regard.evidence.timing import in_turn, ratio
from regard.paper import Run

HEADS, DIM = 8, 64
KV_HEADS = (8, 2)
LENGTHS = (1024, 2048, 4096, 8192)
WINDOW, WINDOW_TOKENS = 256, 4096
OVERHEAD, SPEEDUP = 1.03, 4.0
"""What is aimed at: at most so many times the kernel's time, and at least so many times as fast as a dense mask."""
SECONDS = 8.0
"""Spent on each ratio, within the limits of `ROUNDS`."""
ROUNDS = (15, 2000)
RESULTS = Path(__file__).parent / "results" / "attention.json"
RUN = Run(seed=0, workdir=RESULTS.parent)

Call = Callable[[], Any]


def timed(**calls: Call) -> dict[str, list[float]]:
    """Seconds of each call in every round, as many rounds as the time allows."""
    once = sum(seconds for (seconds,) in in_turn(calls, 1, RUN).values())
    least, most = ROUNDS
    return in_turn(calls, max(least, min(most, int(SECONDS / once))), RUN)


def tensors(queries: int, kv_heads: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, queries, DIM, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, keys, DIM, generator=generator)
    return q, k, v


@torch.no_grad()
def overhead(tokens: int, kv_heads: int, queries: int) -> dict:
    """`attend` against the kernel called with what `attend` finds out by itself: causal, or one query over all keys."""
    q, k, v = tensors(queries, kv_heads, tokens)
    grouped, is_causal = kv_heads != HEADS, queries > 1

    def raw() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)

    def ours() -> Tensor:
        return attend(q, k, v, mask=causal())

    torch.testing.assert_close(ours(), raw())
    times = timed(raw=raw, attend=ours)
    found = ratio(times, "attend", "raw")
    return {
        "case": "prefill" if is_causal else "decode",
        "tokens": tokens,
        "kv_heads": kv_heads,
        "rounds": len(times["raw"]),
        "sdpa_us": 1e6 * median(times["raw"]),
        "attend_us": 1e6 * median(times["attend"]),
        "attend_over_sdpa": found,
        "met": found <= OVERHEAD,
    }


def windowed(tokens: int, size: int, backward: bool) -> dict:
    """`attend` with a window against the kernel with the same window as a dense mask; both are made beforehand."""
    leaves = [tensor.requires_grad_(backward) for tensor in tensors(tokens, HEADS, tokens)]
    grad, mask = torch.ones(1, HEADS, tokens, DIM), window(size)
    dense_mask = mask.tensor(tokens, tokens)

    def dense() -> Any:
        out = scaled_dot_product_attention(*leaves, attn_mask=dense_mask)
        return torch.autograd.grad(out, leaves, grad) if backward else out

    def ours() -> Any:
        out = attend(*leaves, mask=mask)
        return torch.autograd.grad(out, leaves, grad) if backward else out

    torch.testing.assert_close(ours(), dense(), atol=1e-4, rtol=1e-4)
    times = timed(dense=dense, attend=ours)
    found = ratio(times, "dense", "attend")
    return {
        "case": "forward and backward" if backward else "forward",
        "tokens": tokens,
        "window": size,
        "rounds": len(times["dense"]),
        "dense_ms": 1e3 * median(times["dense"]),
        "attend_ms": 1e3 * median(times["attend"]),
        "dense_over_attend": found,
        "met": found >= SPEEDUP,
    }


def show(title: str, rows: list[dict]) -> None:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    costs = [overhead(n, kv, queries) for kv in KV_HEADS for n in LENGTHS for queries in (n, 1)]
    windows = [windowed(WINDOW_TOKENS, WINDOW, backward) for backward in (False, True)]
    show(f"attend over the kernel, {HEADS} heads of {DIM}: at most {OVERHEAD} times its time", costs)
    show(f"attend with a window over a dense mask: at least {SPEEDUP} times as fast", windows)
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__, "heads": HEADS, "dim": DIM}
    targets = {"attend_over_sdpa": OVERHEAD, "dense_over_attend": SPEEDUP}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**versions, "targets": targets, "overhead": costs, "window": windows})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
