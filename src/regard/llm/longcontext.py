"""Long-context evaluation: hidden facts in real text, teacher-forced loss and greedy answers under any cache policy.

A prompt is a context, read first, and turns of question and answer. Passkeys (several word sequences, all of them
recited) are what DuoAttention trains and tests on; the other tasks are small relatives of those of RULER.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from regard.data.text import python_reference
from regard.llm.cache import PolicyCache
from regard.llm.policy import CachePolicy
from regard.llm.use import use

Split = Literal["train", "held_out"]
Progress = Callable[[Sequence["Prompt"]], Iterator["Prompt"]]

NATO = tuple(
    [
        "alpha",
        "bravo",
        "charlie",
        "delta",
        "echo",
        "foxtrot",
        "golf",
        "hotel",
        "india",
        "juliett",
        "kilo",
        "lima",
        "mike",
        "november",
        "oscar",
        "papa",
        "quebec",
        "romeo",
        "sierra",
        "tango",
        "uniform",
        "victor",
        "whiskey",
        "xray",
        "yankee",
        "zulu",
    ]
)
ORDINALS = tuple(
    [
        "first",
        "second",
        "third",
        "fourth",
        "fifth",
        "sixth",
        "seventh",
        "eighth",
        "ninth",
        "tenth",
        "eleventh",
        "twelfth",
        "thirteenth",
        "fourteenth",
        "fifteenth",
        "sixteenth",
        "seventeenth",
        "eighteenth",
        "nineteenth",
        "twentieth",
    ]
)


@dataclass(frozen=True)
class Turn:
    """A question, the answer that teacher forcing feeds, and the strings that a generated answer must contain."""

    question: Int64[Tensor, " asked"]
    answer: Int64[Tensor, " recited"]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A context to read, and questions about it."""

    context: Int64[Tensor, " context"]
    turns: tuple[Turn, ...]

    @property
    def tail(self) -> Int64[Tensor, " tail"]:
        """All questions and answers, one after the other."""
        return torch.cat([part for turn in self.turns for part in (turn.question, turn.answer)])

    @property
    def scored(self) -> Bool[Tensor, " tail"]:
        """True at the tokens of the tail that answer."""
        return torch.cat(
            [
                torch.full(part.shape, fill, dtype=torch.bool)
                for turn in self.turns
                for part, fill in ((turn.question, False), (turn.answer, True))
            ]
        )

    @property
    def tokens(self) -> Int64[Tensor, " tokens"]:
        """The context and the tail."""
        return torch.cat([self.context, self.tail])


class Haystack:
    """Text to hide things in, tokenised once, and cut into a region for training and one that is held out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None, held_out: float = 0.25) -> None:
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
        text = python_reference() if text is None else text
        if not text.strip():
            raise ValueError("the haystack's text is empty; it must contain text")
        self.tokenizer = tokenizer
        cut = round(len(text) * (1 - held_out))
        self._regions = {"train": self._region(text[:cut]), "held_out": self._region(text[cut:])}
        begun = tokenizer("a").input_ids
        has_start = tokenizer.bos_token_id is not None and begun[0] == tokenizer.bos_token_id
        self.start = np.array(begun[:1] if has_start else [], dtype=np.int64)
        """The start-of-text token, where the tokenizer sets one."""

    def _region(self, text: str) -> tuple[str, np.ndarray]:
        tokens = self.encode(text)
        if not len(tokens):
            raise ValueError("the haystack's text is too short to be split in two regions")
        return text, tokens

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a piece of text, without any that mark its start or end."""
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)

    def encode_pair(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a question and of the answer that follows it, cut where the question ends."""
        alone, both = self.encode(question), self.encode(question + answer)
        if len(both) > len(alone) and (both[: len(alone)] == alone).all():
            return alone, both[len(alone) :]
        return alone, self.encode(answer)

    def draw(self, length: int, split: Split, generator: np.random.Generator) -> np.ndarray:
        """Consecutive tokens from a random place of the region, which begins again where it ends."""
        tokens = self._regions[split][1]
        return tokens[(generator.integers(len(tokens)) + np.arange(length)) % len(tokens)]

    def words(self, split: Split) -> list[str]:
        """The different lower-case words of the region, in alphabetical order."""
        return sorted(
            {word for word in self._regions[split][0].split() if word.isalpha() and word.islower() and len(word) > 3}
        )


def passkeys(
    haystack: Haystack,
    number: int,
    *,
    context: int = 1000,
    count: int = 3,
    words: int = 8,
    seed: int = 0,
    split: Split = "held_out",
    depths: tuple[float, float] = (0.05, 0.95),
) -> list[Prompt]:
    """Prompts whose contexts, of exactly `context` tokens, hide `count` passkeys of `words` NATO words each.

    Each passkey sits between blank lines in a sentence that names its ordinal. Their depths are drawn without
    replacement from 1,000 evenly spaced ones, and sorted. The turns ask for every passkey in order. Prompts of the
    two splits share neither seeds nor text.

    Raises ValueError where a size is not positive or the context is too short for the passkeys.

    Source: "DuoAttention", section 2.2 and its official data code, with a sentence of our own.
    """
    _require_positive(number=number, context=context, count=count, words=words)
    if count > len(ORDINALS):
        raise ValueError(f"count must be at most {len(ORDINALS)}, got {count}")
    prompts = []
    for generator in _generators(number, seed, split):
        keys = [" ".join(NATO[i] for i in generator.integers(len(NATO), size=words)) for _ in range(count)]
        needles = [
            f"\n\nRemember the {nth} passkey. The {nth} passkey is: {key}.\n\n"
            for nth, key in zip(ORDINALS, keys, strict=False)
        ]
        turns = [
            _turn(
                haystack,
                f"{'' if first else '.'}\n\nWhat is the {nth} passkey? The {nth} passkey is:",
                " " + key,
                (key,),
            )
            for nth, key, first in zip(ORDINALS, keys, [True] + [False] * (count - 1), strict=False)
        ]
        prompts.append(Prompt(_hidden(haystack, needles, context, split, depths, generator), tuple(turns)))
    return prompts


def single_needle(
    haystack: Haystack, number: int, *, context: int = 1000, seed: int = 0, split: Split = "held_out"
) -> list[Prompt]:
    """Prompts that hide one number, and ask for it."""
    return multi_needle(haystack, number, context=context, needles=1, seed=seed, split=split)


def multi_needle(
    haystack: Haystack, number: int, *, context: int = 1000, needles: int = 4, seed: int = 0, split: Split = "held_out"
) -> list[Prompt]:
    """Prompts that hide a number for each of several words, and ask for one of them: the others distract.

    Source: RULER, section 3, "multi-keys NIAH".
    """
    return _numbers(haystack, number, context, needles, 1, seed, split)


def multi_query(
    haystack: Haystack, number: int, *, context: int = 1000, needles: int = 4, seed: int = 0, split: Split = "held_out"
) -> list[Prompt]:
    """Prompts that hide a number for each of several words, and ask for all of them at once.

    Source: RULER, section 3, "multi-queries NIAH".
    """
    return _numbers(haystack, number, context, needles, needles, seed, split)


def variable_tracking(
    haystack: Haystack,
    number: int,
    *,
    context: int = 1000,
    hops: int = 4,
    chains: int = 1,
    seed: int = 0,
    split: Split = "held_out",
) -> list[Prompt]:
    """Prompts that hide chains of assignments, and ask for all variables that have the first chain's value.

    Source: RULER, section 3, "variable tracking".
    """
    _require_positive(number=number, context=context, hops=hops, chains=chains)
    prompts = []
    for generator in _generators(number, seed, split):
        names = ["".join(letters) for letters in _distinct_letters(chains * (hops + 1), generator)]
        values = generator.choice(np.arange(10_000, 100_000), size=chains, replace=False)
        groups = np.array(names).reshape(chains, hops + 1)
        lines = np.array(
            [
                [
                    f"\n\nVAR {group[0]} = {value}\n\n",
                    *(f"\n\nVAR {b} = VAR {a}\n\n" for a, b in pairwise(group)),
                ]
                for group, value in zip(groups, values, strict=True)
            ]
        )
        # chains are interleaved at random, each in its own order
        order = generator.permutation(np.repeat(np.arange(chains), hops + 1))
        seen = np.zeros(chains, dtype=int)
        needles = []
        for chain in order:
            needles.append(str(lines[chain, seen[chain]]))
            seen[chain] += 1
        question = f"\n\nWhich variables have the value {values[0]}, directly or through other variables? They are:"
        answer = " " + ", ".join(groups[0])
        turn = _turn(haystack, question, answer, tuple(str(name) for name in groups[0]))
        prompts.append(Prompt(_hidden(haystack, needles, context, split, (0.05, 0.95), generator), (turn,)))
    return prompts


def common_words(
    haystack: Haystack,
    number: int,
    *,
    context: int = 1000,
    common: int = 5,
    repeats: int = 15,
    rare_repeats: int = 1,
    seed: int = 0,
    split: Split = "held_out",
) -> list[Prompt]:
    """Prompts whose context is a numbered list of words, `common` of them often, and ask for those.

    The list is as long as fits into `context` tokens. Raises ValueError where the common words alone do not fit.

    Source: RULER, section 3, "common words extraction".
    """
    _require_positive(number=number, context=context, common=common, repeats=repeats, rare_repeats=rare_repeats)
    if rare_repeats >= repeats:
        raise ValueError(f"rare_repeats must be less than repeats, got {rare_repeats} and {repeats}")
    vocabulary = np.array(haystack.words(split))
    if common > len(vocabulary):
        raise ValueError(f"common must be at most {len(vocabulary)}, the words of the haystack, got {common}")
    head = haystack.encode("Here is a numbered list of words. Some of them come often.\n\n")
    prompts = []
    for generator in _generators(number, seed, split):
        shuffled = generator.permutation(vocabulary)
        chosen, others = shuffled[:common], shuffled[common:]
        room = context - len(haystack.start) - len(head)
        kinds = [np.repeat(chosen, repeats)]
        best: np.ndarray | None = None
        low, high = 0, len(others)
        while low <= high:  # bisection over the number of rare words, as a list's tokens grow with it
            middle = (low + high) // 2
            listed = np.concatenate([*kinds, np.repeat(others[:middle], rare_repeats)])
            listed = listed[np.random.default_rng([seed, middle]).permutation(len(listed))]
            tokens = haystack.encode("\n".join(f"{i}. {word}" for i, word in enumerate(listed, 1)))
            if len(tokens) <= room:
                best, low = tokens, middle + 1
            else:
                high = middle - 1
        if best is None:
            raise ValueError(
                f"context must be longer to list {common} words {repeats} times each, got {context} tokens"
            )
        question = f"\n\nWhat are the {common} most common words in the list? The most common words are:"
        turn = _turn(haystack, question, " " + ", ".join(chosen), tuple(str(word) for word in chosen))
        prompts.append(Prompt(torch.from_numpy(np.concatenate([haystack.start, head, best])), (turn,)))
    return prompts


def passages(
    haystack: Haystack,
    number: int,
    *,
    context: int = 1000,
    continuation: int = 256,
    seed: int = 0,
    split: Split = "held_out",
) -> list[Prompt]:
    """Plain text in two parts: a context of exactly `context` tokens, and `continuation` tokens to predict after it."""
    _require_positive(number=number, context=context, continuation=continuation)
    prompts = []
    for generator in _generators(number, seed, split):
        text = haystack.draw(context - len(haystack.start) + continuation, split, generator)
        tokens = torch.from_numpy(np.concatenate([haystack.start, text]))
        turn = Turn(tokens[:0], tokens[context:], ())
        prompts.append(Prompt(tokens[:context], (turn,)))
    return prompts


TASKS: dict[str, Callable[..., list[Prompt]]] = {
    "single_needle": single_needle,
    "multi_needle": multi_needle,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
"""The small RULER-like set, by name."""


def _numbers(
    haystack: Haystack, number: int, context: int, needles: int, asked: int, seed: int, split: Split
) -> list[Prompt]:
    _require_positive(number=number, context=context, needles=needles)
    vocabulary = np.array(haystack.words(split))
    if needles > len(vocabulary):
        raise ValueError(f"needles must be at most {len(vocabulary)}, the words of the haystack, got {needles}")
    prompts = []
    for generator in _generators(number, seed, split):
        keys = [str(key) for key in generator.choice(vocabulary, size=needles, replace=False)]
        values = [str(value) for value in generator.choice(9_000_000, size=needles, replace=False) + 1_000_000]
        sentences = [
            f"\n\nThe special number for {key} is {value}.\n\n" for key, value in zip(keys, values, strict=True)
        ]
        chosen = np.sort(generator.choice(needles, size=asked, replace=False))
        wanted, answers = [keys[i] for i in chosen], tuple(values[i] for i in chosen)
        subject = f"special number for {wanted[0]} is" if asked == 1 else f"special numbers for {', '.join(wanted)} are"
        question = f"\n\nWhat {'is' if asked == 1 else 'are'} the {subject.rsplit(' ', 1)[0]}? The {subject}"
        turn = _turn(haystack, question, " " + ", ".join(answers), answers)
        prompts.append(Prompt(_hidden(haystack, sentences, context, split, (0.05, 0.95), generator), (turn,)))
    return prompts


def _generators(number: int, seed: int, split: Split) -> Iterator[np.random.Generator]:
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    for index in range(number):
        yield np.random.default_rng([seed, ("train", "held_out").index(split), index])


def _distinct_letters(number: int, generator: np.random.Generator) -> np.ndarray:
    codes = generator.choice(26**5, size=number, replace=False)
    return np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))[codes[:, None] // 26 ** np.arange(5) % 26]


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _turn(haystack: Haystack, question: str, answer: str, expected: tuple[str, ...]) -> Turn:
    asked, recited = haystack.encode_pair(question, answer)
    return Turn(torch.from_numpy(asked), torch.from_numpy(recited), expected)


def _hidden(
    haystack: Haystack,
    needles: Sequence[str],
    context: int,
    split: Split,
    depths: tuple[float, float],
    generator: np.random.Generator,
) -> Int64[Tensor, " context"]:
    """Text of `context` tokens in all, with the needles at increasing random depths."""
    pieces = [haystack.encode(needle) for needle in needles]
    length = context - len(haystack.start) - sum(map(len, pieces))
    if length < len(needles):
        raise ValueError(
            f"context must be at least {context - length + len(needles)} tokens to hide all, got {context}"
        )
    hay = haystack.draw(length, split, generator)
    steps = max(1000, len(needles))
    chosen = np.sort(generator.choice(steps, size=len(needles), replace=False))
    points = (np.linspace(*depths, steps)[chosen] * length).astype(int)
    parts = np.split(hay, points)
    mixed = [part for pair in zip(parts, pieces, strict=False) for part in pair]
    return torch.from_numpy(np.concatenate([haystack.start, *mixed, parts[-1]]))


@dataclass(frozen=True)
class Recall:
    """How well a model recites what was hidden, and what it cost."""

    losses: Float[Tensor, " prompts"]
    """Nats per answer token, of every prompt."""
    hits: Float[Tensor, " prompts"]
    """Share of answer tokens that were the most likely ones, of every prompt."""
    bytes_held: int
    """Bytes of keys and values after the last token, the largest over the prompts."""
    prefill_seconds: float
    """Time to read the contexts, all prompts together."""
    tail_seconds: float

    @property
    def loss(self) -> float:
        """Nats per answer token, the mean over the prompts."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Share of answer tokens that were the most likely ones, the mean over the prompts."""
        return self.hits.mean().item()


def recall(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    policy: CachePolicy | None = None,
    *,
    prefill_chunk: int | None = None,
    tail_step: int | None = None,
    progress: Progress = iter,
) -> Recall:
    """The teacher-forced loss of every answer token, under the policy or, without one, of the untouched model.

    The context is read first, whole or in chunks of `prefill_chunk`, and before any question is known: what the policy
    drops then is gone, as for a cache that serves several questions. The tail follows `tail_step` tokens at a time.
    By default that is all at once where the policy is chunk-invariant, since that gives exactly what generation would
    see at a fraction of the cost, and one by one where it is not, as generation does.
    """
    if not prompts:
        raise ValueError("prompts must contain at least one prompt, got none")
    if tail_step is None:
        tail_step = 1 if policy is not None and not policy.chunk_invariant else 1 << 30
    losses, hits, held, clock = [], [], 0, [0.0, 0.0]
    with _under(model, policy):
        for prompt in progress(prompts):
            cache = new_cache(model, policy)
            begun = time.perf_counter()
            last = read(model, prompt.context, cache, prefill_chunk)
            read_by = time.perf_counter()
            tail = prompt.tail
            logits = torch.cat([last, _logits(model, tail[:-1], cache, tail_step)]).float()
            target = tail.to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            scored = prompt.scored.to(logits.device)
            losses.append(loss[scored].mean().cpu())
            hits.append((logits.argmax(-1) == target)[scored].float().mean().cpu())
            held = max(held, bytes_held(cache))
            clock = [clock[0] + read_by - begun, clock[1] + time.perf_counter() - read_by]
    return Recall(torch.stack(losses), torch.stack(hits), held, *clock)


def recite_tails(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    policy: CachePolicy,
    cache: PolicyCache,
    *,
    steps: Callable[[Sequence[tuple[Tensor, Tensor]]], Iterator[tuple[Tensor, Tensor]]] = iter,
) -> tuple[list[Float[Tensor, " scored"]], list[Bool[Tensor, " scored"]]]:
    """Of every prompt, the loss of each scored token of its tail, and whether it was the most likely one.

    The cache, a row for each prompt, has read the contexts, which have one length; the tails are decoded token by
    token, all prompts together, shorter ones padded at their end. The first token of a tail has been predicted by the
    context and does not count. `steps` may show progress.
    """
    tail = torch.nn.utils.rnn.pad_sequence([prompt.tail for prompt in prompts], batch_first=True).to(model.device)
    scored = torch.nn.utils.rnn.pad_sequence([prompt.scored for prompt in prompts], batch_first=True)[:, 1:]
    losses, hits = [], []
    with use(model, policy):
        for token, following in steps(list(zip(tail.T[:-1, :, None], tail.T[1:], strict=True))):
            logits = model(token, past_key_values=cache).logits[:, 0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none").cpu())
            hits.append((logits.argmax(-1) == following).cpu())
    loss, hit = torch.stack(losses, dim=1), torch.stack(hits, dim=1)
    rows = range(len(prompts))
    return [loss[row][scored[row]] for row in rows], [hit[row][scored[row]] for row in rows]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    policy: CachePolicy | None = None,
    *,
    extra_tokens: int = 0,
    prefill_chunk: int | None = None,
) -> list[str]:
    """The model's greedy answer to every question, as many tokens as the true answer has and `extra_tokens` more.

    Later questions follow the model's own earlier answers, on one cache.
    """
    texts = []
    with _under(model, policy):
        cache = new_cache(model, policy)
        read(model, prompt.context, cache, prefill_chunk)
        for turn in prompt.turns:
            token = read(model, turn.question, cache).argmax(-1)
            chosen = [token]
            for _ in range(len(turn.answer) + extra_tokens - 1):
                token = read(model, token, cache).argmax(-1)
                chosen.append(token)
            read(model, token, cache)
            texts.append(tokenizer.decode(torch.cat(chosen), skip_special_tokens=True))
    return texts


def matched(answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that the answer contains, upper and lower case alike.

    Source: RULER, "string match all".
    """
    return sum(wanted.lower() in answer.lower() for wanted in expected) / len(expected)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    policy: CachePolicy | None = None,
    *,
    extra_tokens: int = 4,
    prefill_chunk: int | None = None,
    progress: Progress = iter,
) -> float:
    """The share of expected strings in the model's greedy answers, the mean over all turns of all prompts."""
    if not prompts:
        raise ValueError("prompts must contain at least one prompt, got none")
    scores = [
        matched(text, turn.expected)
        for prompt in progress(prompts)
        for text, turn in zip(
            answers(model, tokenizer, prompt, policy, extra_tokens=extra_tokens, prefill_chunk=prefill_chunk),
            prompt.turns,
            strict=True,
        )
    ]
    return sum(scores) / len(scores)


@contextmanager
def _under(model: PreTrainedModel, policy: CachePolicy | None) -> Iterator[None]:
    with nullcontext() if policy is None else use(model, policy), torch.no_grad():
        yield


def new_cache(model: PreTrainedModel, policy: CachePolicy | None) -> Cache:
    """An empty cache of the policy, or of transformers where there is none."""
    return DynamicCache(config=model.config) if policy is None else policy.cache(model)


def bytes_held(cache: Cache) -> int:
    """Bytes of the keys and values that a cache of any kind holds."""
    if isinstance(cache, PolicyCache):
        return cache.bytes_held
    tensors: list[Any] = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def read(
    model: PreTrainedModel, tokens: Int64[Tensor, " tokens"], cache: Cache, chunk: int | None = None
) -> Float[Tensor, "1 vocabulary"]:
    """The logits after the last token, the cache having taken all of them in, `chunk` at a time."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill chunk must be at least 1 token, got {chunk}")
    for piece in tokens.to(model.device).split(chunk or max(len(tokens), 1)):
        out = model(input_ids=piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[0]


def _logits(
    model: PreTrainedModel, tokens: Int64[Tensor, " tokens"], cache: Cache, step: int
) -> Float[Tensor, "tokens vocabulary"]:
    pieces = tokens.to(model.device).split(step)
    return torch.cat([model(input_ids=p[None], past_key_values=cache, use_cache=True).logits[0] for p in pieces])
