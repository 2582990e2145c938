"""What `regard run recycled_attention` measures: does a refreshed small cache read what an evicting one has lost?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from regard.llm import H2O, CachePolicy, Full, PolicyCache, SnapKV, Streaming, use
from regard.llm.cache import SinksAndRecentStore
from regard.llm.load import Loaded, load
from regard.llm.longcontext import Haystack, Prompt, Split, passages, recite_tails, single_needle
from regard.llm.policies.full import FullLayer, forked
from regard.llm.policies.selected import SelectedStore
from regard.paper import Claim, Run
from regard.papers.recycled_attention.cache_policy import Choice, RecycledAttention, RecycledLayer
from regard.papers.recycled_attention.chains import Chains, learn_chains

PROMPTS, CONTEXT, BATCH = 20, 1000, 10
BUDGETS, STRIDE = (64, 128, 256), 4
WINDOW = 32
"""SnapKV's usual window: the last tokens of the context, which vote."""
PASSAGES, TEXT, CONTINUATION, TEXT_BUDGET, TEXT_STRIDE = 6, 1024, 256, 128, 10
CHAINS, CHAIN_ROWS, CHAIN_STRIDE = Chains(keys=32, links=8), 200, 2
CHAIN_BUDGET = CHAINS.prompt // 4
FIRST_CHAIN_SEED = 1000
"""Of a run's first seed. With seed 0 an earlier recipe's model did not learn the task, which led to the present one."""
KEY = 3
"""Tokens of a key: two symbols and a comma. With a full step every 2, every other symbol is looked up in one."""
LABELS = {
    "full": "full attention",
    "ours": "recycled attention",
    "in_step": f"recycled attention, a full step every {KEY}",
    "snapkv": "SnapKV, the last token votes",
    "snapkv_window": f"SnapKV, the last {WINDOW} tokens vote",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "never": "without refresh",
}


# Reading once for all


def after_reading(
    model: PreTrainedModel, contexts: Int64[Tensor, "batch tokens"], policies: Mapping[str, CachePolicy]
) -> Iterator[tuple[str, CachePolicy, PolicyCache]]:
    """Every policy's cache after the contexts, which were read once, with full attention.

    SnapKV reads the last tokens itself, for these vote; the others take over keys and values, recycled attention also
    the choice of the last token.
    """
    everything = RecycledAttention(budget=max(BUDGETS))
    read = everything.cache(model)
    earlier, last = contexts[:, : -WINDOW - 1], contexts[:, -WINDOW - 1 :]
    with use(model, everything):
        model(earlier, past_key_values=read, logits_to_keep=1)
    for name, policy in policies.items():
        if isinstance(policy, SnapKV):
            cache = handed_over(read, policy, model)
            with use(model, policy):
                model(last, past_key_values=cache, logits_to_keep=1)
            yield name, policy, cache
    with use(model, everything):
        model(last, past_key_values=read, logits_to_keep=1)
    for name, policy in policies.items():
        if isinstance(policy, Full | RecycledAttention):
            yield name, policy, forked(read, policy, model)
        elif isinstance(policy, Streaming):
            yield name, policy, handed_over(read, policy, model)


def handed_over(cache: PolicyCache, policy: CachePolicy, model: PreTrainedModel) -> PolicyCache:
    """A cache of a policy that drops tokens, given all that `cache` holds, which stays as it is."""
    new = policy.cache(model)
    for ours, theirs in zip(new.layers, cache.layers, strict=True):
        assert isinstance(theirs, FullLayer)
        keys, values = theirs.store.everything()
        ours.lazy_initialization(keys, values)
        [store] = ours.stores
        if isinstance(store, SelectedStore):
            store.append(keys, values, 0)
        else:
            assert isinstance(store, SinksAndRecentStore)
            store.write(keys, values)
        ours.seen = theirs.seen
    return new


# A needle in a context


def measure_needles(run: Run, split: Split = "held_out") -> dict[str, float]:
    """Nats and accuracy per answer token, of every system at every budget, on prompts of this seed's own."""
    loaded = _smollm2(run)
    prompts = single_needle(Haystack(loaded.tokenizer), PROMPTS, context=CONTEXT, seed=run.seed, split=split)
    policies: dict[str, CachePolicy] = {"full": Full()}
    for budget in BUDGETS:
        policies[f"streaming_{budget}"] = Streaming(sinks=4, recent=budget - 4)
        policies[f"snapkv_{budget}"] = SnapKV(budget=budget, window=1)
        policies[f"snapkv_window_{budget}"] = SnapKV(budget=budget, window=WINDOW)
        policies[f"ours_{budget}"] = RecycledAttention(budget=budget, stride=STRIDE)
    losses: dict[str, list[Tensor]] = {name: [] for name in policies}
    hits: dict[str, list[Tensor]] = {name: [] for name in policies}
    for start in run.progress(range(0, PROMPTS, BATCH), "prompts read and recited"):
        some = prompts[start : start + BATCH]
        contexts = torch.stack([prompt.context for prompt in some]).to(loaded.model.device)
        systems = after_reading(loaded.model, contexts, policies)
        for name, policy, cache in run.progress(systems, "systems", len(policies)):
            loss, hit = recite_tails(
                loaded.model, some, policy, cache, steps=lambda each: run.progress(each, "decoding")
            )
            losses[name] += loss
            hits[name] += hit
    result = {f"{name}_nll": torch.cat(losses[name]).mean().item() for name in policies}
    result |= {f"{name}_accuracy": torch.cat(hits[name]).float().mean().item() for name in policies}
    for budget in BUDGETS:
        lost = result[f"snapkv_{budget}_nll"] - result["full_nll"]
        result[f"recovered_{budget}"] = (result[f"snapkv_{budget}_nll"] - result[f"ours_{budget}_nll"]) / lost
    run.figure("needles", draw_budgets(result))
    run.figure("chosen", draw_needle(loaded, prompts[0]))
    return result


def refreshed_reads_what_is_lost(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the first claim, on means over the seeds."""
    full = _mean(seeds, "full_nll")
    ours = {budget: _mean(seeds, f"ours_{budget}_nll") for budget in BUDGETS}
    snapkv = {budget: _mean(seeds, f"snapkv_{budget}_nll") for budget in BUDGETS}
    better = all(ours[budget] <= snapkv[budget] - 1.0 for budget in BUDGETS)
    return better and snapkv[128] - ours[128] > 0.8 * (snapkv[128] - full)


# Text that goes on


class NeverAgain(RecycledAttention):
    """Recycled attention that never chooses again: in the end it reads recent tokens only."""

    @override
    def layer(self, config: object, index: int) -> RecycledLayer:
        return NeverAgainLayer(self)


class NeverAgainLayer(RecycledLayer):
    """A layer that has one full step, the context's last."""

    @override
    def full_rows(self, choice: Choice, query: Tensor, visible: object) -> Bool[Tensor, " batch"]:
        return torch.zeros_like(choice.since, dtype=torch.bool)


def measure_text(run: Run, split: Split = "held_out") -> dict[str, float]:
    """Nats per token of text that goes on after its context, in both halves, on passages of this seed's own.

    SnapKV keeps all that is generated: in the end it reads 384 tokens, recycled attention 129 in most steps.
    """
    loaded = _smollm2(run)
    prompts = passages(
        Haystack(loaded.tokenizer), PASSAGES, context=TEXT, continuation=CONTINUATION, seed=run.seed, split=split
    )
    policies: dict[str, CachePolicy] = {
        "full": Full(),
        "ours": RecycledAttention(budget=TEXT_BUDGET, stride=TEXT_STRIDE),
        "never": NeverAgain(budget=TEXT_BUDGET),
        "snapkv": SnapKV(budget=TEXT_BUDGET, window=1),
        "streaming": Streaming(sinks=4, recent=TEXT_BUDGET - 4),
        "h2o": H2O(budget=TEXT_BUDGET),
    }
    contexts = torch.stack([prompt.context for prompt in prompts]).to(loaded.model.device)
    losses: dict[str, Tensor] = {}

    def recite(name: str, policy: CachePolicy, cache: PolicyCache) -> None:
        loss, _ = recite_tails(
            loaded.model, prompts, policy, cache, steps=lambda each: run.progress(each, f"decoding, {LABELS[name]}")
        )
        losses[name] = torch.stack(loss)

    for name, policy, cache in after_reading(loaded.model, contexts, policies):
        recite(name, policy, cache)
    heavy = policies["h2o"].cache(loaded.model)  # its scores are sums over the whole prompt, so it reads for itself
    with use(loaded.model, policies["h2o"]):
        loaded.model(contexts, past_key_values=heavy, logits_to_keep=1)
    recite("h2o", policies["h2o"], heavy)
    run.figure("text", draw_text(losses))
    half = CONTINUATION // 2
    result = {f"{name}_nll": loss.mean().item() for name, loss in losses.items()}
    result |= {f"{name}_earlier_nll": loss[:, :-half].mean().item() for name, loss in losses.items()}
    return result | {f"{name}_later_nll": loss[:, -half:].mean().item() for name, loss in losses.items()}


def refreshed_keeps_up(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the second claim, on means over the seeds."""
    ours = _mean(seeds, "ours_later_nll")
    return all(ours < _mean(seeds, f"{name}_later_nll") for name in ("snapkv", "never"))


# Chains of keys


def measure_chains(run: Run) -> dict[str, float]:
    """The share of keys whose second symbol is right, by the key's place in the chain, of every system."""
    seed = FIRST_CHAIN_SEED + run.seed
    model = learn_chains(seed, progress=lambda steps, name: run.progress(steps, name)).to(run.device)
    sequences = CHAINS.draw(CHAIN_ROWS, torch.Generator().manual_seed(seed + (1 << 20))).to(run.device)
    policies: dict[str, CachePolicy] = {
        "full": Full(),
        "ours": RecycledAttention(budget=CHAIN_BUDGET, stride=CHAIN_STRIDE),
        "in_step": RecycledAttention(budget=CHAIN_BUDGET, stride=KEY),
        "snapkv": SnapKV(budget=CHAIN_BUDGET, window=1),
        "streaming": Streaming(sinks=4, recent=CHAIN_BUDGET - 4),
    }
    accuracy = {name: said_right(model, policy, sequences) for name, policy in policies.items()}
    run.figure("chains", draw_chains(accuracy))
    run.figure("chain_chosen", draw_chain(model, sequences[:1]))
    result = {
        f"{name}_{place}": share for name, shares in accuracy.items() for place, share in enumerate(shares.tolist(), 1)
    }
    return result | {f"{name}_from_third": shares[2:].mean().item() for name, shares in accuracy.items()}


@torch.no_grad()
def said_right(
    model: PreTrainedModel, policy: CachePolicy, sequences: Int64[Tensor, "rows tokens"]
) -> Float[Tensor, " links"]:
    """The share of second symbols that the model says, of every key of the chain; what is said is fed, not taken."""
    prompt, said = sequences[:, : CHAINS.prompt], sequences[:, CHAINS.prompt :]
    cache = policy.cache(model)
    with use(model, policy):
        logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
        logits += [model(token[:, None], past_key_values=cache).logits[:, -1] for token in said.T[:-1]]
    hits = torch.stack(logits, dim=1).argmax(-1) == said
    return hits[:, CHAINS.looked_up - CHAINS.prompt].float().mean(0).cpu()


def refreshed_follows_chains(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the third claim, on means over the seeds."""
    learnt = all(_mean(seeds, f"full_{place}") > 0.9 for place in range(1, CHAINS.links + 1))
    return learnt and _mean(seeds, "ours_from_third") > _mean(seeds, "snapkv_from_third")


# Pictures


def read_by(cache: PolicyCache) -> Float[Tensor, " tokens"]:
    """The share of all KV heads that would read each token so far in a partial step, in the first row."""
    shares = []
    for layer in cache.layers:
        assert isinstance(layer, RecycledLayer) and layer.choice is not None
        read = layer.choice.positions(layer.seen)[0, :, :-1]
        shares.append(torch.zeros(read.shape[0], layer.seen).scatter(1, read.cpu(), 1.0).mean(0))
    return torch.stack(shares).mean(0)


@torch.no_grad()
def reading(
    model: PreTrainedModel, policy: RecycledAttention, prompt: Int64[Tensor, "1 prompt"], tail: Int64[Tensor, " tail"]
) -> Float[Tensor, "tail prompt"]:
    """The share of KV heads that read each token of the prompt, after each token of the tail."""
    cache = policy.cache(model)
    rows = []
    with use(model, policy):
        model(prompt, past_key_values=cache, logits_to_keep=1)
        for token in tail.to(prompt.device):
            rows.append(read_by(cache)[: prompt.shape[1]])
            model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
    return torch.stack(rows)


def draw_needle(loaded: Loaded, prompt: Prompt) -> Figure:
    """Which tokens of the context the heads read while they answer; the needle is between the lines."""
    policy = RecycledAttention(budget=BUDGETS[0], stride=STRIDE)
    shares = reading(loaded.model, policy, prompt.context[None].to(loaded.model.device), prompt.tail)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.sqrt(), cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    answer = prompt.turns[0].answer
    found = (prompt.context.unfold(0, len(answer), 1) == answer).all(1).nonzero()
    if len(found):
        for edge in (int(found[0]) - 0.5, int(found[0]) + len(answer) - 0.5):
            axes.axvline(edge, color="tab:cyan", linewidth=0.8)
    axes.axhline(len(prompt.turns[0].question) - 0.5, color="white", linestyle="--", linewidth=0.8)
    axes.set(xlabel="token of the context (the number asked for: blue lines)", ylabel="question, then answer")
    axes.set_title(
        f"share of KV heads that read a token, budget {policy.budget}, a full step every {policy.stride}; "
        "the first rows are the context's own choice",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="square root of the share")
    return figure


def draw_chain(model: PreTrainedModel, sequence: Int64[Tensor, "1 tokens"]) -> Figure:
    """Which keys of the list the heads read at each step of the chain; rings: the keys just looked up."""
    policy = RecycledAttention(budget=CHAIN_BUDGET, stride=CHAIN_STRIDE)
    prompt, said = sequence[:, : CHAINS.prompt], sequence[0, CHAINS.prompt :]
    shares = reading(model, policy, prompt, said)[:, : 3 * CHAINS.keys].unflatten(1, (CHAINS.keys, 3)).amax(-1)
    second = prompt[0, 1 : 3 * CHAINS.keys : 3]
    steps = 3 * torch.arange(CHAINS.links)
    wanted = [int((second == symbol).nonzero()) for symbol in said[::3]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="magma", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.scatter(wanted, steps, s=70, facecolors="none", edgecolors="tab:cyan")
    axes.set(
        xlabel="key of the list",
        ylabel="token of the chain",
        title="share of KV heads that read a key; rings: just looked up",
    )
    figure.colorbar(image, ax=axes)
    return figure


def draw_budgets(result: Mapping[str, float]) -> Figure:
    """Nats per answer token against the budget."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(result["full_nll"], color="gray", linestyle="--", label=LABELS["full"])
    for name in ("ours", "snapkv", "snapkv_window", "streaming"):
        axes.plot(BUDGETS, [result[f"{name}_{budget}_nll"] for budget in BUDGETS], marker="o", label=LABELS[name])
    axes.set(xlabel="tokens read per KV head", ylabel="nats per answer token", xticks=BUDGETS)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{PROMPTS} numbers hidden in {CONTEXT} tokens")
    axes.legend()
    return figure


def draw_text(losses: Mapping[str, Float[Tensor, "passages tokens"]], width: int = 32) -> Figure:
    """How much worse than full attention each system is, along the continuation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, loss in losses.items():
        if name != "full":
            apart = (loss - losses["full"]).mean(0).unfold(0, width, width).mean(1)
            axes.plot(width * (torch.arange(len(apart)) + 0.5), apart, marker="o", label=LABELS[name])
    axes.axhline(0.0, color="gray", linestyle="--")
    axes.set(xlabel="tokens after the context", ylabel="nats per token above full attention")
    axes.set_title(f"{PASSAGES} passages, {TEXT_BUDGET} of {TEXT} tokens")
    axes.legend()
    return figure


def draw_chains(accuracy: Mapping[str, Float[Tensor, " links"]]) -> Figure:
    """The share of keys that are right, by their place in the chain."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, shares in accuracy.items():
        axes.plot(range(1, CHAINS.links + 1), shares, marker="o", label=LABELS[name])
    axes.set(xlabel="place in the chain", ylabel="share of keys that are right", ylim=(0, 1.05))
    axes.set_title(f"{CHAINS.keys} keys in {CHAINS.prompt} tokens, {CHAIN_BUDGET} of them read")
    axes.legend()
    return figure


def _mean(seeds: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.mean(seed[name] for seed in seeds)


def _smollm2(run: Run) -> Loaded:
    return run.once("smollm2", lambda: load("smollm2", device=run.device))


CLAIMS = [
    Claim(
        name="a refreshed small cache reads what an evicting one has lost",
        statement=(
            f"SmolLM2-135M, {PROMPTS} held-out prompts of {CONTEXT} tokens that hide a number, asked for after the "
            "context was read; a full step every 4. In nats per answer token, means over the seeds: recycled attention "
            "is at least 1 below SnapKV that chose from the context's last token, with 64, 128 and 256 tokens, and "
            "recovers more than 80% of what SnapKV loses to full attention with 128."
        ),
        published="RULER 32K, Llama-3.1-8B, K = 4096: full 90, ours 86 / 80, SnapKV 79, StreamingLLM 22, H2O 21",
        baseline="full; SnapKV (last token votes; last 32 vote); StreamingLLM; all from one full prefill",
        measure=measure_needles,
        holds=refreshed_reads_what_is_lost,
        seeds=3,
        minutes=5.0,
    ),
    Claim(
        name="a refreshed small cache keeps up with text",
        statement=(
            f"SmolLM2-135M, {PASSAGES} held-out passages, {TEXT} tokens read and {CONTINUATION} predicted, budget "
            f"{TEXT_BUDGET}, a full step every {TEXT_STRIDE}: over the later half of the predicted tokens recycled "
            "attention has fewer nats per token than SnapKV that chose from the context's last token, and than itself "
            "without refresh, means over the seeds."
        ),
        published="perplexity 16K, K = 2048: fixed stride 10: 2.32, without refresh 2.50 (arXiv, Llama-3.1-8B)",
        baseline="the same choice never refreshed; SnapKV; StreamingLLM; H2O; full",
        measure=measure_text,
        holds=refreshed_keeps_up,
        seeds=3,
        minutes=5.0,
    ),
    Claim(
        name="a refreshed small cache follows chains of keys",
        statement=(
            f"A rotary model of 4 layers, 4 heads and width 128, trained from scratch on chains of {CHAINS.links} keys "
            f"in a list of {CHAINS.keys}: with a quarter of the context read and a full step every {CHAIN_STRIDE} "
            f"tokens (a key has {KEY}), the share of keys that are right, over the places in the chain from the third "
            "on, is above that of SnapKV; with full attention it is above 90% at every place; means over the seeds."
        ),
        published="chain-of-key, Llama-3.1-70B: full 56, ours 25 / 15, best baseline 12",
        baseline="SnapKV that chose from the prompt's last token, the chain's first symbol; StreamingLLM; full",
        measure=measure_chains,
        holds=refreshed_follows_chains,
        seeds=3,
        minutes=3.0,
    ),
]
