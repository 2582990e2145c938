"""Chains of keys: a shuffled list of pairs, and the walk through it that a first symbol begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SYMBOLS = 32
COMMA, ASK = SYMBOLS, SYMBOLS + 1
"""What follows each key, and what ends the list."""


@dataclass(frozen=True)
class Chains:
    """Lists of `keys` keys, each of two symbols, and the chain of the first `links` keys from a given symbol on.

    The keys of a list form one cycle, so every symbol begins one key and ends one, and no chain meets itself. A
    sequence is the list, `ASK` and the first symbol: the prompt; then what is to be said. For a b, c a, b c and a that
    is `a b , c a , b c , ? a` and `b , b c , c a ,`.

    Source: the chain-of-key task of "RefreshKV", with symbols for words.
    """

    keys: int = SYMBOLS
    links: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.keys <= SYMBOLS:
            raise ValueError(f"keys must be from 2 to {SYMBOLS}, got {self.keys}")
        if not 1 <= self.links <= self.keys:
            raise ValueError(f"links must be from 1 to the {self.keys} keys, got {self.links}")

    @property
    def prompt(self) -> int:
        """Tokens of the list, `ASK` and the first symbol."""
        return 3 * self.keys + 2

    @property
    def looked_up(self) -> Int64[Tensor, " links"]:
        """Where in a sequence the second symbols of the chain's keys stand: what cannot be said without the list."""
        return self.prompt + 3 * torch.arange(self.links)

    def draw(self, rows: int, generator: torch.Generator) -> Int64[Tensor, "rows tokens"]:
        """Sequences of prompts and chains."""
        cycle = torch.rand(rows, SYMBOLS, generator=generator).argsort(dim=1)[:, : self.keys]
        keys = torch.stack([cycle, cycle.roll(-1, dims=1), torch.full_like(cycle, COMMA)], dim=-1)
        order = torch.rand(rows, self.keys, generator=generator).argsort(dim=1)
        listed = keys.gather(1, order[..., None].expand_as(keys)).flatten(1)
        said = keys[:, : self.links].flatten(1)  # begins with the first symbol, which the prompt gives
        return torch.cat([listed, torch.full((rows, 1), ASK), said], dim=1)


@dataclass(frozen=True)
class ChainTraining:
    """How the little model learns chains: from short lists to long ones, as it masters each length."""

    stages: tuple[tuple[int, int, int], ...] = ((8, 8, 32), (16, 16, 16), (32, 16, 8))
    """Keys of the list, links of the chain and sequences in a step, of each stage in turn."""
    most_steps: int = 3000
    """Of a stage, whether or not it is mastered."""
    mastered: float = 0.99
    """Share of the looked-up symbols, over 20 steps, with which a stage ends."""
    learning_rate: float = 1e-3
    """At twice that, some seeds never leave the plateau on which a lookup is a guess among the keys listed."""


def little_model() -> PreTrainedModel:
    """A new rotary model of 4 layers with 4 heads and 128 channels, for the symbols of chains."""
    config = LlamaConfig(
        vocab_size=SYMBOLS + 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def learn_chains(
    seed: int,
    training: ChainTraining | None = None,
    *,
    progress: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, name: steps,
) -> PreTrainedModel:
    """A little model trained from scratch to say chains: the loss is that of all that follows the prompt."""
    training = training or ChainTraining()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = little_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 0.02, total_iters=50)
    for keys, links, batch in training.stages:
        chains = Chains(keys, links)
        recent: list[float] = []
        for _ in progress(range(training.most_steps), f"learning chains in {keys} keys"):
            tokens = chains.draw(batch, generator)
            said = tokens[:, chains.prompt :]
            logits = model(tokens, use_cache=False).logits[:, chains.prompt - 1 : -1]
            loss = cross_entropy(logits.flatten(0, 1), said.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            warm_up.step()
            hits = (logits.argmax(-1) == said)[:, ::3]  # every third is a second symbol, which has to be looked up
            recent = [*recent[-19:], hits.float().mean().item()]
            if len(recent) == 20 and sum(recent) / 20 >= training.mastered:
                break
    return model.eval().requires_grad_(False)
