"""Text from a pretrained language model under a cache policy, piece by piece as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regard.blocks.language_model import sample
from regard.llm.cache import PolicyCache
from regard.llm.load import Loaded, chat, context_length
from regard.llm.longcontext import read
from regard.llm.policies.full import Full
from regard.llm.policy import CachePolicy
from regard.llm.use import use

Stopped = Literal["end", "length", "context"]
"""Why a text ended: the model ended it, it has as many tokens as were asked for, or the model's context is full."""

CHUNK = 512
"""Tokens of a prompt that are read at once where that changes nothing: memory grows with it, speed hardly."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How many tokens are made, and how each is chosen."""

    max_new_tokens: int = 256
    """Most tokens to make."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, the higher the more varied."""
    top_p: float = 1.0
    """At a temperature above 0, draw out of the likeliest tokens whose probabilities reach this."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Summary:
    """What a text took to make."""

    prompt_tokens: int
    new_tokens: int
    """Tokens made, the one that ended the text included."""
    stopped: Stopped
    prefill_seconds: float
    """Time to read the prompt."""
    decode_seconds: float
    """Time in the model after that."""
    bytes_held: int
    """Bytes of keys and values in the cache at the end."""
    bytes_of_bookkeeping: int
    """Bytes of positions and scores that the policy keeps beside them."""
    bytes_of_full_attention: int
    """Bytes of keys and values that the untouched model would hold after the same tokens."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens made after the first, which comes with the prompt; 0 where there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, *, in_chat: bool = True
) -> Int64[Tensor, "1 tokens"]:
    """The tokens of a prompt: a user's message in the model's chat format where it has one, else the text as it is.

    Raises ValueError where the prompt is empty, or where there is a system message and no chat format to put it in.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; it must contain text")
    if in_chat and tokenizer.chat_template:
        from jinja2 import TemplateError

        try:
            return chat(tokenizer, prompt, system)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None
    if system is not None:
        raise ValueError("a system message needs the model's chat format, which is off or which it does not have")
    tokens = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if not tokens.numel():
        raise ValueError(f"the prompt must hold at least one token, got none for {prompt[:20]!r}")
    return tokens.long()


class Generation:
    """A text that is being made: iterate over its pieces once, and `summary` tells what it took.

    A prompt is read in chunks of `prefill_chunk`; without one, in chunks of 512 where the policy says that chunks
    change nothing, and else whole. `on_read` hears, many times, how many of the prompt's tokens have been read. While
    the iteration lasts, the model is under the policy and gradients are off.

    Raises ValueError where the policy does not fit the model, where the prompt is longer than the model's context, or
    where the model's numbers overflow.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: Int64[Tensor, "1 tokens"],
        policy: CachePolicy,
        sampling: Sampling | None = None,
        *,
        prefill_chunk: int | None = None,
        on_read: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        config = loaded.model.config.get_text_config()
        policy.check(config)
        self.loaded, self.prompt, self.policy = loaded, prompt[0], policy
        self.sampling, self.on_read = sampling or Sampling(), on_read
        self.chunk = prefill_chunk or (CHUNK if policy.chunk_invariant else len(self.prompt))
        self.summary: Summary | None = None
        """What it took; None until the last piece is out."""
        limit = context_length(config)
        if limit is not None and len(self.prompt) > limit:
            raise ValueError(f"the prompt has {len(self.prompt):,} tokens, more than the model's context of {limit:,}")
        # the last token made is not read again, so it needs no place
        self.room = self.sampling.max_new_tokens if limit is None else limit - len(self.prompt) + 1

    def __iter__(self) -> Iterator[str]:
        model, sampling = self.loaded.model, self.sampling
        generator = torch.Generator().manual_seed(sampling.seed)
        text = TextStream(self.loaded.tokenizer, self.prompt.tolist())
        ends = end_tokens(self.loaded)
        most = min(sampling.max_new_tokens, self.room)
        stopped: Stopped = "length" if most == sampling.max_new_tokens else "context"
        with use(model, self.policy):
            cache = self.policy.cache(model)
            begun = time.perf_counter()
            logits = self._read(cache)
            prefill_seconds, decode_seconds = time.perf_counter() - begun, 0.0
            for made in range(1, most + 1):
                if bool(logits.isnan().any()):
                    raise ValueError(f"the model's numbers overflow in {model.dtype}; load it with another dtype")
                token = sample(logits.float().cpu(), sampling.temperature, sampling.top_p, generator)
                if token.item() in ends:
                    stopped = "end"
                    break
                if piece := text.add(int(token)):
                    yield piece
                if made < most:
                    begun = time.perf_counter()
                    logits = read(model, token, cache)
                    decode_seconds += time.perf_counter() - begun
            if rest := text.rest():
                yield rest
        self.summary = Summary(
            prompt_tokens=len(self.prompt),
            new_tokens=made,
            stopped=stopped,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            bytes_held=cache.bytes_held,
            bytes_of_bookkeeping=cache.bytes_of_bookkeeping,
            bytes_of_full_attention=self._bytes_of_full_attention(len(self.prompt) + made - 1),
        )

    def _read(self, cache: PolicyCache) -> Float[Tensor, "1 vocabulary"]:
        model = self.loaded.model
        layers, passed = model.config.get_text_config().num_hidden_layers, 0

        def heard(tokens: int) -> None:
            nonlocal passed
            passed += tokens
            self.on_read(passed // layers)

        with watched(model, heard):
            logits = read(model, self.prompt, cache, self.chunk)
        self.on_read(len(self.prompt))
        return logits

    def _bytes_of_full_attention(self, tokens: int) -> int:
        model = self.loaded.model
        return Full().promised_bytes(model.config.get_text_config(), 1, tokens, model.dtype.itemsize)


class TextStream:
    """Turns tokens into text as they come, and never gives out a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._context = list(before[-8:])  # what stands before a token decides whether its space is kept
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain with this token and was not before; empty inside a character."""
        self._new.append(token)
        piece = self._piece()
        if piece.endswith(UNFINISHED):
            return ""
        self._context, self._new = self._new, []
        return piece

    def rest(self) -> str:
        """The text that was held back, without a last character that is still unfinished."""
        return self._piece().rstrip(UNFINISHED) if self._new else ""

    def _piece(self) -> str:
        return self._decoded(self._context + self._new)[len(self._decoded(self._context)) :]

    def _decoded(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def end_tokens(loaded: Loaded) -> set[int]:
    """The tokens that end a text: what the model's generation config says, or else its tokenizer."""
    config = loaded.model.generation_config
    ends = None if config is None else config.eos_token_id
    ends = loaded.tokenizer.eos_token_id if ends is None else ends
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def watched(model: PreTrainedModel, heard: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, tells every time a layer is done how many tokens have gone through it."""
    number = model.config.get_text_config().num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == number)

    def tell(module: nn.Module, args: Any, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        heard(stream.shape[1])

    hooks = [layer.register_forward_hook(tell) for layer in next(lists, ())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
