"""Decoding SmolLM2 at 8k tokens of context: the untouched model, and every policy at a 16th of the context.

Run alone on the machine: `python benchmarks/llm.py`. The ways take turns token by token, so every ratio is of one run;
means over 40 steps, since recycled attention reads everything in every tenth.
The part of a step that is not attention is what a step costs at the very beginning of a text. A policy that holds
everything reads a 16th in most steps or layers.
"""

import time
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from regard.data.text import python_reference
from regard.evidence.llm_bench import find_policies
from regard.evidence.store import write_json
from regard.llm import CachePolicy, Full, Quantised, load, use
from regard.llm.longcontext import Haystack, bytes_held, new_cache, read
from regard.llm.policies.full import FullLayer, forked

CONTEXTS = (8128,)
SHARE = 16
STEPS, WARM = 40, 4
CHUNK = 1024
LEAST = 1e-3
"""Seconds of attention below which a ratio would be one of noise."""
RESULTS = Path(__file__).parent / "results" / "llm.json"

UNTOUCHED = "untouched model"


def ways(context: int) -> dict[str, CachePolicy | None]:
    """The policies that are compared; None leaves the model and transformers' own cache as they are."""
    policies = {name: kind().with_budget(context // SHARE, context) for name, kind in find_policies().items()}
    return {UNTOUCHED: None, **policies, "full, 8 bits": Quantised(Full(), bits=8)}


def step_seconds(
    model: PreTrainedModel, policies: dict[str, CachePolicy | None], caches: dict[str, Cache], token: Tensor
) -> dict[str, list[float]]:
    """Seconds of each of the next steps, the ways taking turns."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(WARM + STEPS):
        for name, cache in caches.items():
            policy = policies[name]
            if policy is None:
                seconds = one_step(model, token, cache)
            else:
                with use(model, policy):
                    seconds = one_step(model, token, cache)
            if step >= WARM:
                times[name].append(seconds)
    return times


@torch.no_grad()
def one_step(model: PreTrainedModel, token: Tensor, cache: Cache) -> float:
    begun = time.perf_counter()
    model(token, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - begun


def filled(model: PreTrainedModel, policy: CachePolicy | None, tokens: Tensor) -> Cache:
    """The way's cache after it has read the tokens."""
    cache = new_cache(model, policy)
    if policy is None:
        with torch.no_grad():
            read(model, tokens, cache, CHUNK)
    else:
        with use(model, policy):
            read(model, tokens, cache, CHUNK)
    return cache


def measure(model: PreTrainedModel, text: Tensor, context: int) -> list[dict]:
    """One row for each way of decoding after so many tokens."""
    token = text[:1][None]
    policies = ways(context)
    caches: dict[str, Cache] = {}
    for name, policy in policies.items():
        if policy is not None and "full" in caches and isinstance(policy.cache(model).layers[0], FullLayer):
            caches[name] = forked(caches["full"], policy, model)  # it would have read the context in the same way
        else:
            caches[name] = filled(model, policy, text[:context])
    held = {name: bytes_held(cache) for name, cache in caches.items()}
    print(f"{context} tokens are read", flush=True)
    begun_only = {name: filled(model, policy, text[:1]) for name, policy in policies.items()}
    at_start = step_seconds(model, policies, begun_only, token)
    steps = step_seconds(model, policies, caches, token)
    rest = {name: mean(times) for name, times in at_start.items()}
    attention = {name: mean(steps[name]) - rest[name] for name in steps}
    return [
        {
            "context": context,
            "way": name,
            "kv_mib": held[name] / 2**20,
            "step_ms": 1e3 * mean(steps[name]),
            "attention_ms": 1e3 * attention[name],
            "attention_share": attention[name] / mean(steps[name]),
            "step_speedup": mean(steps[UNTOUCHED]) / mean(steps[name]),
            "attention_speedup": attention[UNTOUCHED] / attention[name] if attention[name] > LEAST else None,
        }
        for name in steps
    ]


def main() -> None:
    torch.set_num_threads(2)
    loaded = load("smollm2")
    text = torch.from_numpy(Haystack(loaded.tokenizer).encode(python_reference()[: 8 * max(CONTEXTS)]))
    assert len(text) >= max(CONTEXTS)
    rows = [row for context in CONTEXTS for row in measure(loaded.model, text, context)]
    table = Table(*rows[0], title="SmolLM2-135M, fp32, one sequence, 2 threads", title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value or "-") for value in row.values()))
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"threads": torch.get_num_threads(), "steps": STEPS, "rows": rows})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
