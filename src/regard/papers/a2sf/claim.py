"""What `regard run a2sf` measures: does forgetting choose better than the plain sum, and is it fair to young tokens?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attention.attend import attend
from regard.attention.masks import sinks_and_window
from regard.llm import CachePolicy, Streaming, attach
from regard.llm.attach import AttentionFunction, softmax_attention
from regard.llm.load import Loaded, load
from regard.llm.longcontext import Haystack
from regard.llm.visible import Visible
from regard.paper import Claim, Run
from regard.papers.a2sf.cache_policy import A2SF
from regard.papers.a2sf.search import best_factor, draw_passages, later_losses, losses_under, sweep
from regard.papers.a2sf.selection import grouped_logits, ideal_mask, mask_similarity, simulate

PASSAGES, LENGTH = 16, 512
MASK_PASSAGES = 8
"""The first of the passages, on which masks are compared."""
SHARES = 0.1, 0.2, 0.3
MAIN = 0.2
"""The share at which all systems are compared."""
FACTORS = 0.2, 0.5, 0.9
TUNING_PASSAGES, TUNING_SEED = 4, 100
"""What chooses the factor: text of the other split, with seeds of its own."""
LABELS = {
    "full": "full attention",
    "ideal": "ideal mask",
    "a2s": "plain sum (A2S)",
    "h2o": "H2O: plain sum, half recent",
    "window": "last tokens",
    **{f"a2sf_{factor}": f"A2SF, a = {factor}" for factor in FACTORS},
}


def systems(share: float) -> dict[str, A2SF]:
    """What is compared at a share of the length, apart from the window: policies whose every token is a step."""
    plain = A2SF.of_share(LENGTH, share, forgetting=1.0, prefill="stepwise")
    forgetting = {f"a2sf_{factor}": replace(plain, forgetting=factor) for factor in FACTORS}
    return {"a2s": plain, "h2o": replace(plain, recent=plain.budget // 2), **forgetting}


# Perplexity and masks


def measure_forgetting(run: Run) -> dict[str, float]:
    """The perplexity of the second halves under every system, and how like the ideal mask its choice is."""
    return run.once("a2sf: forgetting", lambda: _measure_forgetting(run))


def measure_recent_half(run: Run) -> dict[str, float]:
    """The perplexities of the same measurement that tell whether forgetting does without H2O's recent half."""
    measured = measure_forgetting(run)
    return {name: measured[name] for name in (f"ppl_best_{MAIN}", f"ppl_h2o_{MAIN}", "ppl_full")}


def _measure_forgetting(run: Run) -> dict[str, float]:
    loaded = _smollm2(run)
    model = loaded.model
    held_out = run.once("a2sf: passages", lambda: _passages(loaded, PASSAGES, run.seed, "held_out"))
    chosen = _chosen_factor(run, loaded)
    looked = run.once("a2sf: masks", lambda: look(model, held_out[:MASK_PASSAGES]))
    cases: dict[str, CachePolicy] = {}
    for share in SHARES:
        for name, system in systems(share).items():
            if share == MAIN or name in ("a2s", "h2o", f"a2sf_{chosen}"):
                cases[f"{name}_{share}"] = system
    main = systems(MAIN)
    cases[f"window_{MAIN}"] = Streaming(sinks=0, recent=main["a2s"].budget + 1)
    cases[f"guarded_0.2_{MAIN}"] = replace(main["a2sf_0.2"], streaming=4)
    perplexity = {"full": _perplexity(later_losses(model, held_out))}
    for name, policy in run.progress(list(cases.items()), "systems"):
        perplexity[name] = _perplexity(losses_under(model, policy, held_out))
    with attach(model, ideal_attention(main["a2s"].budget + 1)):
        perplexity[f"ideal_{MAIN}"] = _perplexity(later_losses(model, held_out))
    for share in SHARES:  # seeds may choose different factors, and all must measure the same
        best = f"a2sf_{chosen}_{share}"
        perplexity[f"best_{share}"] = perplexity[best] if share == MAIN else perplexity.pop(best)
    similarity = {name: value for name, value in looked.items() if name.startswith("similarity")}
    run.figure("perplexity", draw_perplexity(perplexity))
    run.figure("similarity", draw_similarity(similarity))
    run.figure("masks", draw_masks(model, held_out[:1]))
    return {"chosen_factor": chosen} | {f"ppl_{name}": value for name, value in perplexity.items()} | similarity


@torch.no_grad()
def look(model: PreTrainedModel, passages: Int64[Tensor, "passages tokens"]) -> dict[str, float]:
    """What every system would keep of the untouched model's attention, all judged on the same queries and keys.

    The cosine with the ideal mask and the age of the keys that a query sees, means over layers, heads and the queries
    that do not see everything.
    """
    totals: dict[str, list[float]] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        logits = grouped_logits(query, key, scale)
        for share in SHARES:
            number = systems(share)["a2s"].budget + 1
            ideal = ideal_mask(logits, number)[..., number:, :]
            for name, mask in masks_of(logits, share).items():
                kept = mask[..., number:, :]
                totals.setdefault(f"similarity_{name}_{share}", []).append(mask_similarity(kept, ideal).mean().item())
                totals.setdefault(f"age_{name}_{share}", []).append(mean_age(kept))
            totals.setdefault(f"age_ideal_{share}", []).append(mean_age(ideal))
        return softmax_attention(module, query, key, value, visible, scale)

    with attach(model, attention):
        model.base_model(passages.to(model.device), use_cache=False)
    return {name: statistics.mean(each) for name, each in totals.items()}


def masks_of(
    logits: Float[Tensor, "batch kv_heads group queries keys"], share: float
) -> dict[str, Bool[Tensor, "batch kv_heads queries keys"]]:
    """The mask of every system at this share of the length, and that of the last tokens."""
    masks = {
        name: simulate(logits, budget=policy.budget, forgetting=policy.forgetting, recent=policy.recent)
        for name, policy in systems(share).items()
    }
    like = masks["a2s"]
    window = sinks_and_window(0, systems(share)["a2s"].budget + 1).tensor(*like.shape[-2:])
    return masks | {"window": window.to(like.device).expand_as(like)}


def mean_age(mask: Bool[Tensor, "batch kv_heads queries keys"]) -> float:
    """How many tokens ago the keys came that the queries see, on average; the queries are the last of the keys."""
    queries, keys = mask.shape[-2:]
    position = torch.arange(keys, device=mask.device)
    age = (position[keys - queries :, None] - position).expand_as(mask)
    return age[mask].double().mean().item()


def ideal_attention(number: int) -> AttentionFunction:
    """An attention function under which every query sees the `number` keys that it gives most attention to."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        mask = ideal_mask(grouped_logits(query, key, scale), number)
        return attend(query, key, value, mask=mask.repeat_interleave(query.shape[1] // key.shape[1], 1), scale=scale)

    return attention


def forgetting_wins(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the first claim, on means over the seeds."""
    likest = max(_mean(seeds, f"similarity_a2sf_{factor}_{MAIN}") for factor in FACTORS)
    similar = likest >= _mean(seeds, f"similarity_a2s_{MAIN}") + 0.05
    better = all(_mean(seeds, f"ppl_best_{share}") < _mean(seeds, f"ppl_a2s_{share}") for share in SHARES)
    return similar and better


def no_half_is_needed(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the second claim, on means over the seeds."""
    return _mean(seeds, f"ppl_best_{MAIN}") <= _mean(seeds, f"ppl_h2o_{MAIN}")


# Age


def measure_age(run: Run) -> dict[str, float]:
    """How old the keys are that queries see, by forgetting factor."""
    loaded = _smollm2(run)
    held_out = run.once("a2sf: passages", lambda: _passages(loaded, PASSAGES, run.seed, "held_out"))
    looked = run.once("a2sf: masks", lambda: look(loaded.model, held_out[:MASK_PASSAGES]))
    ages = {name: value for name, value in looked.items() if name.startswith("age")}
    run.figure("age", draw_ages(ages))
    return ages


def plain_sum_keeps_the_old(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the third claim, on means over the seeds."""
    return all(
        _mean(seeds, f"age_a2s_{share}") >= 1.1 * _mean(seeds, f"age_a2sf_{factor}_{share}")
        for share in SHARES
        for factor in FACTORS
    )


def age_follows_the_factor(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the fourth claim, on means over the seeds."""
    names = [*(f"a2sf_{factor}" for factor in FACTORS), "a2s"]
    ages = ([_mean(seeds, f"age_{name}_{share}") for name in names] for share in SHARES)
    return all(of_share == sorted(set(of_share)) for of_share in ages)


# Pictures


def draw_perplexity(perplexity: Mapping[str, float]) -> Figure:
    """Perplexity against the share of the length that is held; systems measured at one share only are single dots."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(perplexity["full"], color="gray", linestyle="--", label=LABELS["full"])
    for name, label in LABELS.items():
        points = [(share, perplexity[f"{name}_{share}"]) for share in SHARES if f"{name}_{share}" in perplexity]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.plot(
        SHARES, [perplexity[f"best_{share}"] for share in SHARES], marker="o", label="A2SF, factor found on other text"
    )
    axes.set(xlabel="tokens held, share of the length", ylabel="perplexity of the second half", xticks=SHARES)
    axes.set_yscale("log")
    axes.set_title(f"{PASSAGES} passages of {LENGTH} tokens, every token a step with eviction")
    axes.legend(fontsize=8)
    return figure


def draw_similarity(similarity: Mapping[str, float]) -> Figure:
    """The cosine with the ideal mask against the share of the length that is held."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        if f"similarity_{name}_{MAIN}" in similarity:
            axes.plot(SHARES, [similarity[f"similarity_{name}_{share}"] for share in SHARES], marker="o", label=label)
    axes.set(xlabel="tokens held, share of the length", ylabel="cosine with the ideal mask", xticks=SHARES)
    axes.legend(fontsize=8)
    return figure


def draw_ages(ages: Mapping[str, float]) -> Figure:
    """The mean age of what is kept, by system."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        if f"age_{name}_{MAIN}" in ages:
            axes.plot(SHARES, [ages[f"age_{name}_{share}"] for share in SHARES], marker="o", label=label)
    axes.set(xlabel="tokens held, share of the length", ylabel="mean age of the tokens kept", xticks=SHARES)
    axes.legend(fontsize=8)
    return figure


@torch.no_grad()
def draw_masks(model: PreTrainedModel, passage: Int64[Tensor, "1 tokens"], layer: int = 12) -> Figure:
    """What one KV head of one layer keeps of a passage, query by query: the plain sum, forgetting, and the ideal."""
    shown: dict[str, Tensor] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        if module.layer_idx == layer:
            logits = grouped_logits(query, key, scale)
            masks = masks_of(logits, MAIN)
            masks["ideal"] = ideal_mask(logits, systems(MAIN)["a2s"].budget + 1)
            shown.update({name: masks[name][0, 0].cpu() for name in ("a2s", "h2o", "a2sf_0.5", "a2sf_0.9", "ideal")})
        return softmax_attention(module, query, key, value, visible, scale)

    with attach(model, attention):
        model.base_model(passage.to(model.device), use_cache=False)
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        axes.imshow(mask, cmap="Greys", interpolation="nearest", aspect="auto")
        axes.set_title(LABELS[name], fontsize=9)
        axes.set(xlabel="key")
    figure.axes[0].set(ylabel="query")
    figure.suptitle(f"keys that are seen (black): layer {layer}, KV head 0, {MAIN:.0%} of {LENGTH} tokens held")
    return figure


def _chosen_factor(run: Run, loaded: Loaded) -> float:
    """The best of the factors on text of the other split."""

    def choose() -> float:
        text = _passages(loaded, TUNING_PASSAGES, TUNING_SEED + run.seed, "train")
        policy = systems(MAIN)["a2s"]
        return best_factor(sweep(loaded.model, text, policy, FACTORS, lambda each: run.progress(each, "factors")))

    return run.once("a2sf: factor", choose)


def _passages(loaded: Loaded, number: int, seed: int, split: Any) -> Int64[Tensor, "passages tokens"]:
    return draw_passages(Haystack(loaded.tokenizer), number, LENGTH, seed, split)


def _perplexity(losses: Float[Tensor, "passages later"]) -> float:
    return math.exp(losses.mean().item())


def _mean(seeds: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.mean(seed[name] for seed in seeds)


def _smollm2(run: Run) -> Loaded:
    return run.once("smollm2", lambda: load("smollm2", device=run.device))


CLAIMS = [
    Claim(
        name="forgetting beats plain accumulation",
        statement=(
            f"SmolLM2-135M, {PASSAGES} held-out passages of {LENGTH} tokens, every token a step of decoding from the "
            "first one on, 10, 20 and 30% of the length held. Means over the seeds: with 20% the A2SF mask (factor "
            "0.2, 0.5 or 0.9) most like the ideal one is at least 0.05 nearer to it, in cosine over "
            f"{MASK_PASSAGES} of the passages, than the plain sum's; "
            "A2SF, its factor chosen on 4 other passages, has a lower perplexity on the second halves than the plain "
            "sum at every budget."
        ),
        published="accuracy up to +7.8 points 1-shot, +5.1 points 0-shot over the plain sum, LLaMA-2-7B; nearer masks",
        baseline="plain sum (A2S); H2O, half of it recent tokens; the last tokens; ideal mask; full attention",
        measure=measure_forgetting,
        holds=forgetting_wins,
        seeds=3,
        minutes=8.0,
    ),
    Claim(
        name="forgetting needs no recent half",
        statement=(
            "On the same passages with 20% of the length held, in perplexity of the second halves, means over the "
            "seeds: A2SF, all of whose tokens are chosen by their scores, is at most H2O, half of whose tokens are the "
            "last ones."
        ),
        published="forgetting favours young tokens by itself; accuracy above H2O at equal cache, LLaMA-2-7B",
        baseline="H2O, half of it recent tokens",
        measure=measure_recent_half,
        holds=no_half_is_needed,
        seeds=3,
        minutes=0.1,
    ),
    Claim(
        name="a plain sum keeps old tokens",
        statement=(
            "On the passages whose masks are compared, at every budget, the mean age of the tokens that a query sees "
            "is under the plain sum at least 1.1 times that under A2SF with factors 0.2, 0.5 and 0.9; means over the "
            "seeds."
        ),
        published="a plain sum favours early tokens, which more queries could see (section 3)",
        baseline="plain sum, factor 1",
        measure=measure_age,
        holds=plain_sum_keeps_the_old,
        seeds=3,
        minutes=2.0,
    ),
    Claim(
        name="age grows with the factor",
        statement="On the same passages, at every budget, that mean age grows with the factor: 0.2, 0.5, 0.9, 1.",
        published="the smaller the factor, the more recent queries count (section 3)",
        baseline="each factor against the next",
        measure=measure_age,
        holds=age_follows_the_factor,
        seeds=3,
        minutes=0.1,
    ),
]
