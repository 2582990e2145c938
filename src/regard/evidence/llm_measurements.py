"""What is measured of a cache policy: what it still finds and predicts, what it holds, what a token costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from regard.evidence.timing import timed
from regard.llm import CachePolicy, Loaded, Quantised, use
from regard.llm.longcontext import TASKS, Haystack, Prompt, accuracy, passages, passkeys, read, recall
from regard.paper import Run

WARM = 2
"""Steps after a context that are not timed."""
PASSKEYS, WORDS = 2, 8


@dataclass(frozen=True)
class Documents:
    """What every policy reads and is asked, in contexts of one length."""

    passkeys: list[Prompt]
    tasks: dict[str, list[Prompt]]
    plain: list[Prompt]


def documents(loaded: Loaded, text: str, context: int, number: int, continuation: int, seed: int) -> Documents:
    """`number` documents of every task, out of the part of the text that no search has seen.

    Raises ValueError where the text or the context is too short.
    """
    haystack = Haystack(loaded.tokenizer, text)
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context + continuation > limit:
        raise ValueError(f"contexts must leave room in the model's {limit} tokens, got {context}")
    tasks = {name: make(haystack, number, context=context, seed=seed) for name, make in TASKS.items()}
    return Documents(
        passkeys(haystack, number, context=context, count=PASSKEYS, words=WORDS, seed=seed),
        tasks,
        passages(haystack, number, context=context, continuation=continuation, seed=seed),
    )


def measure(
    loaded: Loaded, policy: CachePolicy, bits: int | None, given: Documents, run: Run, name: str
) -> dict[str, Any]:
    """The fields of an `LLMResult` that are measured."""
    policy = policy if bits is None else Quantised(policy, bits)

    def progress(what: str) -> Any:
        def show(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
            return run.progress(prompts, f"{name}: {what}")

        return show

    found = recall(loaded.model, given.passkeys, policy, progress=progress("passkeys"))
    tasks = {
        task: accuracy(loaded.model, loaded.tokenizer, prompts, policy, progress=progress(task))
        for task, prompts in given.tasks.items()
    }
    plain = [_continued(loaded.model, prompt, policy, run.device) for prompt in progress("text")(given.plain)]
    return {
        "passkey_loss": found.loss,
        "passkey_accuracy": found.accuracy,
        "ruler": mean(tasks.values()),
        "text_loss": mean(loss for loss, _, _ in plain),
        "kv_bytes": found.bytes_held,
        "prefill_seconds": min(prefill for _, prefill, _ in plain),
        "decode_seconds": median(step for _, _, steps in plain for step in steps),
        "tasks": tasks,
    }


@torch.no_grad()
def _continued(
    model: PreTrainedModel, prompt: Prompt, policy: CachePolicy, device: str
) -> tuple[float, float, list[float]]:
    """Loss per token of the text after the context, seconds to read the context, and seconds of the steps after it."""
    with use(model, policy):
        cache = policy.cache(model)
        prefill, logits = timed(lambda: read(model, prompt.context, cache), device)
        losses, steps = [], []
        for token in prompt.tail.to(model.device).split(1):
            losses.append(torch.nn.functional.cross_entropy(logits.float(), token).item())
            seconds, logits = timed(lambda token=token: read(model, token, cache), device)  # type: ignore[misc]
            steps.append(seconds)
    return mean(losses), prefill, steps[min(WARM, len(steps) - 1) :]
