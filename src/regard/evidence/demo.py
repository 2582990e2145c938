"""The demonstration: a language model reads a long document under four cache policies, and is asked about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attention.attend import attend
from regard.evidence.report import Report
from regard.llm.attach import attach
from regard.llm.generate import watched
from regard.llm.load import Loaded, context_length
from regard.llm.longcontext import NATO, ORDINALS, Haystack, Prompt, Turn, answers, matched, recall
from regard.llm.policies.full import Full
from regard.llm.policies.selected import some_queries
from regard.llm.policy import CachePolicy
from regard.llm.visible import Visible
from regard.papers.duo_attention import DuoAttention, Gates, random_gates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = 8
"""Words of a passkey; the first is given with the question."""
MOST = 3
"""Passkeys that a document may hide: no two share a word, and there are 26."""
COLOURS = ("#d95f02", "#7570b3", "#1b9e77")


@dataclass(frozen=True)
class Row:
    """What one way of reading gave, and what it cost."""

    way: str
    answers: tuple[str, ...]
    """The model's answer to every question."""
    correct: int
    """How many of them are right."""
    loss: float
    """Nats per passkey token, the passkeys being fed."""
    bytes_held: int
    """Bytes of keys and values in the cache, after the document and all answers."""
    prefill_seconds: float
    """Time to read the document."""
    decode_seconds: float
    """Time of the questions and answers that follow, token by token."""


def hide(haystack: Haystack, context: int, passkeys: int, seed: int = 0) -> tuple[Prompt, list[range]]:
    """A document of `context` tokens that hides so many passkeys, with the questions; and where the passkeys are.

    A question gives the first word of a passkey, and the model is to recite the others: small models can tell passkeys
    apart by what they begin with, and hardly by their ordinals. Each is hidden in its part of the document, one after
    the other. Raises ValueError where they do not fit in.
    """
    if not 1 <= passkeys <= MOST:
        raise ValueError(f"passkeys must be from 1 to {MOST}, got {passkeys}")
    generator = np.random.default_rng(seed)
    keys = generator.permutation(NATO)[: passkeys * WORDS].reshape(passkeys, WORDS).tolist()
    needles, turns = [], []
    for nth, key in zip(ORDINALS, keys, strict=False):
        sentence = f"\n\nRemember the {nth} passkey. The {nth} passkey is: {' '.join(key)}.\n\n"
        rest = " ".join(key[1:])
        question = f"\n\nWhat is the {nth} passkey? The {nth} passkey is: {key[0]}"
        asked, recited = haystack.encode_pair(question, f" {rest}")
        needles.append(haystack.encode(sentence))
        turns.append(Turn(torch.from_numpy(asked), torch.from_numpy(recited), (rest,)))
    room = context - len(haystack.start) - sum(map(len, needles))
    if room < 10 * passkeys:
        least = context - room + 10 * passkeys
        raise ValueError(f"tokens must be at least {least} to hide {passkeys} passkeys, got {context}")
    depths = (np.arange(passkeys) + generator.uniform(0.2, 0.8, passkeys)) / passkeys
    parts = np.split(haystack.draw(room, "held_out", generator), (depths * room).astype(int))
    pieces, places, length = [haystack.start], [], len(haystack.start)
    for part, needle in zip(parts, needles, strict=False):
        pieces += [part, needle]
        length += len(part) + len(needle)
        places.append(range(length - len(needle), length))
    document = torch.from_numpy(np.concatenate([*pieces, parts[-1]]))
    return Prompt(document, tuple(turns)), places


def question_of(loaded: Loaded, turn: Turn) -> str:
    """What is asked, up to where the model goes on."""
    return " ".join(str(loaded.tokenizer.decode(turn.question)).split())


def four_ways(gates: Gates, seed: int = 0) -> dict[str, CachePolicy]:
    """The policies that are compared, by name. The last two hold the same bytes."""
    window: dict[str, Any] = {"sinks": gates.sinks, "recent": gates.recent}
    layers, heads = gates.values.shape
    arbitrary = random_gates(layers, heads, torch.Generator().manual_seed(seed))
    return {
        "full attention": Full(),
        "streaming heads": DuoAttention(gates=gates, sparsity=1.0, **window),
        "half at random": DuoAttention(gates=arbitrary, **window),
        "DuoAttention": DuoAttention(gates=gates, **window),
    }


def check(loaded: Loaded, prompt: Prompt, ways: Mapping[str, CachePolicy]) -> None:
    """Raises ValueError, before anything runs, where a policy does not fit the model, or the document does not."""
    config = loaded.model.config.get_text_config()
    for policy in ways.values():
        policy.check(config)
    limit = context_length(config)
    if limit is not None and len(prompt.tokens) > limit:
        raise ValueError(
            f"tokens must leave room for the questions in the model's context of {limit:,}, "
            f"got {len(prompt.context):,} and {len(prompt.tail)} for the questions"
        )


def measure(
    loaded: Loaded, prompt: Prompt, way: str, policy: CachePolicy, advance: Callable[[float], None] = lambda share: None
) -> Row:
    """What the model recites under the policy, and what that costs. `advance` hears each share of the work done."""
    model, answer_tokens = loaded.model, sum(len(turn.answer) for turn in prompt.turns)
    layers = model.config.get_text_config().num_hidden_layers
    passes = len(prompt.tail) + 1 + answer_tokens + len(prompt.turns)
    total = layers * _work(2 * len(prompt.tokens) - 1, passes)
    with watched(model, lambda tokens: advance(_work(tokens, passes=1) / total)):
        fed = recall(model, [prompt], policy, tail_step=1)
        said = answers(model, loaded.tokenizer, prompt, policy)
    right = sum(matched(text, turn.expected) == 1.0 for text, turn in zip(said, prompt.turns, strict=True))
    texts = tuple(" ".join(text.split()) for text in said)
    return Row(way, texts, right, fed.loss, fed.bytes_held, fed.prefill_seconds, fed.tail_seconds)


def _work(tokens: int, passes: int) -> float:
    return tokens / 20 + passes  # a token in a long chunk costs a small part of what it costs alone


def look(
    loaded: Loaded, prompt: Prompt, places: Sequence[range], policy: CachePolicy
) -> dict[str, Float[Tensor, "recited document"]]:
    """Where two heads look, under full attention, when they recite each token of the passkeys: weights by title.

    They are the clearest of either kind: of the heads that keep everything under the policy, the one that looks most at
    the passkey being recited, and of the streaming heads the one that looks most at its sinks and recent tokens. A
    head's weights are the mean over the query heads that share its keys.
    """
    assert isinstance(policy, DuoAttention)
    weights = _weights(loaded.model, prompt)
    query = prompt.scored.nonzero() - 1 + len(prompt.context)
    key = torch.arange(weights.shape[-1])
    near = (key < policy.sinks) | (query - key < policy.recent)
    turns = [place for place, turn in zip(places, prompt.turns, strict=True) for _ in turn.answer]
    passkey = torch.stack([(key >= place.start) & (key < place.stop) for place in turns])
    on_near, on_passkey = ((weights * mask).sum(-1).mean(-1) for mask in (near, passkey))
    best = (
        on_passkey.masked_fill(~policy.retrieval, -1.0).argmax(),
        on_near.masked_fill(policy.retrieval, -1.0).argmax(),
    )
    retrieval, streaming = (divmod(int(place), weights.shape[1]) for place in best)
    return {
        f"Retrieval head {retrieval[0]}.{retrieval[1]}: {on_passkey[retrieval]:.0%} of its attention is on the passkey "
        "that the model recites": weights[retrieval],
        f"Streaming head {streaming[0]}.{streaming[1]}: {on_near[streaming]:.0%} of its attention is on the first "
        f"{policy.sinks} and the last {policy.recent} tokens": weights[streaming],
    }


def _weights(model: PreTrainedModel, prompt: Prompt) -> Float[Tensor, "layers kv_heads recited tokens"]:
    """The attention from the token before each token of the answers, which is where the model decides on it."""
    before = (prompt.scored.nonzero()[:, 0] - 1).to(model.device)
    tail, found = len(prompt.tail), []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        last = some_queries(visible, visible.queries - tail, visible.queries)
        seen = attend(query[:, :, -tail:], key, value, mask=last.over(), scale=scale, need_weights=True)
        assert seen.weights is not None
        found.append(seen.weights[0].unflatten(0, (key.shape[1], -1)).mean(1)[:, before].cpu().float())
        return attend(query, key, value, mask=visible.over(), scale=scale)

    with attach(model, attention), torch.no_grad():
        model.base_model(prompt.tokens[None].to(model.device), use_cache=False)
    return torch.stack(found)


def draw_attention(heads: Mapping[str, Tensor], prompt: Prompt, places: Sequence[range]) -> Figure:
    """The document from left to right, the recited words downwards: dark where a head looks while it says the word."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    end = len(prompt.context)
    said = [len(turn.answer) for turn in prompt.turns]
    tops = np.cumsum([0, *said[:-1]])
    width = max(end // 120, 1)
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    panels = figure.subplots(len(heads), 1, sharex=True)
    for axes, (title, weights) in zip(panels, heads.items(), strict=True):
        bins = -(-weights.shape[1] // width)
        binned = nn.functional.pad(weights, (0, bins * width - weights.shape[1])).unflatten(1, (bins, width)).sum(-1)
        extent = (0, bins * width, sum(said), 0)
        image = axes.imshow(binned.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", extent=extent)
        for place, colour, top, rows in zip(places, COLOURS, tops, said, strict=False):
            axes.axvspan(place.start, place.stop, color=colour, alpha=0.15, lw=0)
            corner, size = (place.start - width, top), (len(place) + 2 * width, rows)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, lw=1.5))
        axes.axvline(end, color="black", lw=0.8, ls=":")
        axes.set_title(title, pad=44 if axes is panels[0] else 8)
        axes.set_yticks(tops + np.array(said) / 2, [f"passkey {index}" for index in range(1, len(said) + 1)])
        for label, colour in zip(axes.get_yticklabels(), COLOURS, strict=False):
            label.set_color(colour)
        axes.set_ylabel("while it recites")
    for index, (place, colour) in enumerate(zip(places, COLOURS, strict=False), 1):
        panels[0].annotate(
            f"passkey {index}\nis hidden here",
            ((place.start + place.stop) / 2, 0),
            (0, 14),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=9,
            arrowprops={"arrowstyle": "->", "color": colour},
        )
    panels[-1].set_xlabel("token of the document; right of the dotted line: the questions and answers so far")
    figure.colorbar(image, ax=panels, label="share of the head's attention (square root)", shrink=0.6)
    return figure


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Loss and bytes of every way, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.55 * len(rows) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row.way for row in rows]
    colours = ["#7f7f7f", "#bdbdbd", "#e6ab02", "#1b9e77"]
    bars = left.barh(names, [row.loss for row in rows], color=colours)
    left.bar_label(bars, [f"{row.loss:.2f}" for row in rows], padding=3)
    left.set(xlabel="nats per passkey token (less is better)")
    bars = right.barh(names, [row.bytes_held / 1e6 for row in rows], color=colours)
    right.bar_label(bars, [f"{row.bytes_held / 1e6:.1f}" for row in rows], padding=3)
    right.set(xlabel="MB of keys and values held")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    return figure


def next_commands(model: str) -> tuple[str, ...]:
    """What to try after the demonstration."""
    chosen = "" if model == "smollm2" else f" --model {model}"
    return (
        f"regard generate{chosen} --policy duo_attention --prompt-file README.md",
        "regard run duo_attention",
        "regard show duo_attention",
    )


def demo_report(
    loaded: Loaded, prompt: Prompt, places: Sequence[range], rows: Sequence[Row], heads: Mapping[str, Tensor]
) -> Report:
    """The table, the pictures, and what to try next, as a page."""
    tokens, hidden = len(prompt.context), len(prompt.turns)
    report = Report(
        "One document, read four ways",
        f"{loaded.name}, {tokens:,} tokens of the Python language reference, {hidden} hidden passkeys",
    )
    report.text(
        "A language model keeps keys and values of every token it has read, for every attention head: its cache, which "
        "grows with the document. Here the same model reads the same document four times, with four rules for what the "
        "cache may keep, and is then asked for the passkeys that were hidden in the text. The built-in document is one "
        "in which full attention finds them all, so that what a rule loses can be seen; --seed makes others."
    )
    headers = ["way", "right", "nats per passkey token", "MB held", "document read in s", "answers in s"]
    report.table(
        headers,
        [
            [
                row.way,
                f"{row.correct} of {hidden}",
                round(row.loss, 2),
                round(row.bytes_held / 1e6, 1),
                round(row.prefill_seconds, 1),
                round(row.decode_seconds, 1),
            ]
            for row in rows
        ],
        caption="The last two rows hold the same bytes and differ in which half of the KV heads keeps everything; the "
        "random half is one draw, and another --seed gives another one, with another document.",
    )
    report.figure(draw_bars(rows), "Loss on the passkeys, and bytes of the cache")
    report.heading("Why it matters which heads keep everything")
    report.figure(draw_attention(heads, prompt, places), "Where two heads look while the model recites the passkeys")
    report.text(
        "The clearest head of either kind. A frame marks where the passkey being recited is hidden: a retrieval head "
        "looks into the frame, wherever in the document it is; a streaming head looks at the beginning and at what is "
        "near, and loses little when the rest is dropped."
    )
    report.heading("What the model said")
    for index, turn in enumerate(prompt.turns):
        report.text(f"{question_of(loaded, turn)} …   (right: {turn.expected[0]})")
        report.table(
            ["way", "answer", "right"],
            [[row.way, row.answers[index], matched(row.answers[index], turn.expected) == 1.0] for row in rows],
        )
    report.heading("What to try next").code("\n".join(next_commands(loaded.name)))
    return report
