"""regard's policies and kvpress on the same prompts and model: passkey loss at equal bytes truly held, decode speed.

kvpress needs an older transformers, and has an environment of its own (see peers/kvpress/requirements.txt).
Run alone on the machine: `python benchmarks/against_kvpress.py`. Contexts are read before the questions are known, each
prompt by itself; bytes are counted after the context. Decoding is timed at a longer context, in turns of a round each.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from llm import one_step
from regard.data.text import python_reference
from regard.evidence.store import write_json
from regard.llm import H2O, CachePolicy, Full, Quantised, SnapKV, load, use
from regard.llm.longcontext import Haystack, Prompt, bytes_held, new_cache, passkeys, read, recall
from regard.papers.a2sf import A2SF
from regard.papers.duo_attention import DuoAttention
from regard.papers.razor_attention import RazorAttention

HERE = Path(__file__).parent
PEER = HERE / "peers" / "kvpress"
RESULTS = HERE / "results" / "against_kvpress.json"
PROMPTS, CONTEXT, SEED = 8, 1000, 20_000
DECODE_CONTEXT, DECODE_STEPS, THREADS = 4096, 48, 2


def policies(budget: int) -> dict[str, CachePolicy | None]:
    """Ours, at about `budget` tokens of every head; DuoAttention sets the budget.

    The policies that hold everything, and read a part of it, are compared in `llm.py`.
    """
    duo = DuoAttention.pretrained()
    return {
        "untouched model": None,
        "full": Full(),
        "full, 8 bits": Quantised(Full(), bits=8),
        "duo_attention": duo,
        "duo_attention, 8 bits": Quantised(duo, bits=8),
        "razor_attention": RazorAttention().with_budget(budget, CONTEXT),
        "a2sf": A2SF().with_budget(budget, CONTEXT),
        "snapkv": SnapKV(budget=budget),
        "h2o": H2O(budget=budget),
    }


def settings(ratio: float) -> list[dict]:
    """Their presses, which drop the share `ratio` of every head's tokens; DuoAttentionPress masks half of the heads."""
    compressing = ("SnapKVPress", "ExpectedAttentionPress", "TOVAPress", "StreamingLLMPress", "KnormPress")
    return [
        {"press": None, "options": {}},
        *({"press": name, "options": {"compression_ratio": ratio}} for name in compressing),
        {
            "press": "ObservedAttentionPress",
            "options": {"compression_ratio": ratio},
            "attention": "eager",
            "decode": False,
        },
        {"press": "DuoAttentionPress", "options": {"head_compression_ratio": 0.5, "on_the_fly_scoring": True}},
    ]


def held_after(model: PreTrainedModel, policy: CachePolicy | None, context: torch.Tensor) -> int:
    """Bytes of keys and values once the context is read."""
    cache = new_cache(model, policy)
    with torch.no_grad():
        if policy is None:
            read(model, context, cache)
        else:
            with use(model, policy):
                read(model, context, cache)
    return bytes_held(cache)


def ours(model: PreTrainedModel, prompts: list[Prompt], long: torch.Tensor, budget: int) -> list[dict]:
    rows = []
    for name, policy in policies(budget).items():
        result = recall(model, prompts, policy)
        cache, times = new_cache(model, policy), []
        with torch.no_grad():
            if policy is None:
                read(model, long, cache)
                times = [one_step(model, long[-1:][None], cache) for _ in range(DECODE_STEPS)]
            else:
                with use(model, policy):
                    read(model, long, cache)
                    times = [one_step(model, long[-1:][None], cache) for _ in range(DECODE_STEPS)]
        rows.append(
            {
                "library": "regard",
                "method": name,
                "loss": result.loss,
                "accuracy": result.hits.mean().item(),
                "kv_mib": held_after(model, policy, prompts[0].context) / 2**20,
                "decode_ms": 1e3 * median(times),
            }
        )
    return rows


def theirs(folder: Path) -> tuple[dict, list[dict]]:
    python = PEER / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"kvpress is not installed: {PEER / 'requirements.txt'} says how")
    subprocess.run([python, PEER / "measure.py", folder], check=True)
    results = json.loads((folder / "results.json").read_text())
    rows = [
        {
            "library": "kvpress",
            "method": row["press"] or "none",
            "loss": row["loss"],
            "accuracy": row["accuracy"],
            "kv_mib": row["bytes_held"] / 2**20,
            "decode_ms": 1e3 * row["decode_seconds"] if "decode_seconds" in row else None,
        }
        for row in results["rows"]
    ]
    return results["versions"], rows


def main() -> None:
    torch.set_num_threads(THREADS)
    loaded = load("smollm2")
    haystack = Haystack(loaded.tokenizer)
    prompts = passkeys(haystack, PROMPTS, context=CONTEXT, seed=SEED, split="held_out")
    long = torch.from_numpy(haystack.encode(python_reference()[: 8 * DECODE_CONTEXT]))[:DECODE_CONTEXT]
    share = held_after(loaded.model, DuoAttention.pretrained(), prompts[0].context) / held_after(
        loaded.model, None, prompts[0].context
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded.model.save_pretrained(folder / "model")
        loaded.tokenizer.save_pretrained(folder / "model")
        rows = ours(loaded.model, prompts, long, round(share * CONTEXT))
        described = [
            {"context": p.context.tolist(), "tail": p.tail.tolist(), "scored": p.scored.tolist()} for p in prompts
        ]
        contents = {
            "prompts.json": described,
            "settings.json": settings(1 - share),
            "decode.json": {"context": long.tolist(), "steps": DECODE_STEPS, "threads": THREADS},
        }
        for file, content in contents.items():
            (folder / file).write_text(json.dumps(content))
        (folder / "text.txt").write_text(python_reference())
        versions, others = theirs(folder)
        rows += others
    table = Table(*rows[0], title=f"{PROMPTS} prompts of {CONTEXT} tokens; decoding after {DECODE_CONTEXT}")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    about = {"prompts": PROMPTS, "context": CONTEXT, "decode_context": DECODE_CONTEXT, "threads": THREADS}
    write_json(RESULTS, {**about, "share_of_bytes": share, "kvpress": versions, "rows": rows})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
