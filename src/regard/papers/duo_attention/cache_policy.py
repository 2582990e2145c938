"""Serving under DuoAttention: all tokens for retrieval heads, the first and the last ones for streaming heads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override
from tyro.constructors import PrimitiveConstructorSpec

from regard.attention.attend import attend
from regard.attention.masks import causal
from regard.data.files import write_atomically
from regard.llm.cache import KVLayer, PolicyCache, SinksAndRecentStore, Store
from regard.llm.policy import CachePolicy, head_dim, kv_heads, require_budget
from regard.llm.split import SplitLayer
from regard.llm.visible import Visible
from regard.papers.duo_attention.gates import Gates, binarise, load_gates, save_gates
from regard.papers.duo_attention.streaming import streaming_attention

Prefill = Literal["released", "streaming"]
SHIPPED = Path(__file__).parent / "gates"


def find_gates(source: str | os.PathLike[str]) -> Gates:
    """The gates of that name which ship with this room, or those in a folder.

    Raises FileNotFoundError, with the names that ship, where there are neither.
    """
    path = Path(source)
    places = (SHIPPED / path.name, path) if path.name == os.fspath(source) else (path,)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        names = ", ".join(sorted(place.name for place in SHIPPED.glob("*/")))
        raise FileNotFoundError(f"gates must be a folder or one of {names}, got {str(source)!r}")
    return load_gates(folder)


_AS_FLAG = PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME|FOLDER",
    instance_from_str=lambda given: find_gates(given[0]),
    is_instance=lambda given: isinstance(given, Gates),
    str_from_instance=lambda gates: [str(gates.settings.get("exp_name", gates))],
)


@dataclass(frozen=True)
class DuoAttention(CachePolicy):
    """Full caches for the heads that retrieve from the whole context, sinks and recent tokens for all others.

    Positions are never re-indexed: keys keep the rotation of their place in the whole sequence.

    Source: "DuoAttention", sections 2.3 and 2.4, and the authors' `tuple_kv_cache`.
    """

    gates: Annotated[Gates, _AS_FLAG] = field(default_factory=lambda: find_gates("smollm2-135m-instruct"))
    """What the search found for the model: a name that ships with this room, or a folder of the authors' format."""
    sparsity: float = 0.5
    """Share of the KV heads that stream; those with the lowest gates."""
    sinks: int = 64
    """First tokens that a streaming head keeps."""
    recent: int = 256
    """Last tokens that a streaming head keeps."""
    prefill: Prefill = "released"
    """released: in the first chunk of a prompt all heads see everything, and streaming heads forget afterwards; in
    later chunks they see what they keep and the chunk. streaming: they see sinks and recent tokens only, from the first
    token on, at linear cost and in constant memory, however the prompt is cut into chunks."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(
                f"sparsity must be from 0 (all heads full) to 1 (all heads streaming), got {self.sparsity}"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1, the token itself, got {self.recent}")
        if self.prefill not in ("released", "streaming"):
            raise ValueError(f"prefill must be 'released' or 'streaming', got {self.prefill!r}")

    @classmethod
    def pretrained(cls, name: str = "smollm2-135m-instruct", **options: Any) -> DuoAttention:
        """The policy with gates that ship with this room, and the sinks and recent tokens they were trained for."""
        gates = find_gates(name)
        return cls(gates=gates, **{"sinks": gates.sinks, "recent": gates.recent, **options})

    @classmethod
    def from_official(cls, folder: str | os.PathLike[str], **options: Any) -> DuoAttention:
        """The policy with the authors' published gates: their `full_attention_heads.tsv` and `config.json` in a folder.

        Sinks and recent tokens are 64 and 256, as the authors deploy them, whatever the gates were trained with.
        """
        return cls(gates=load_gates(folder), **options)

    @classmethod
    def of_heads(cls, retrieval: Bool[Tensor, "layers kv_heads"], **options: Any) -> DuoAttention:
        """The policy that keeps everything for exactly these heads."""
        return cls(gates=Gates(retrieval.float()), sparsity=1.0 - retrieval.double().mean().item(), **options)

    @property
    def chunk_invariant(self) -> bool:  # type: ignore[override]
        """Whether the chunks of a prompt change nothing; the released prefill looks at the first one whole."""
        return self.prefill == "streaming" or bool(self.retrieval.all())

    @cached_property
    def retrieval(self) -> Bool[Tensor, "layers kv_heads"]:
        """True where a head keeps all tokens."""
        return binarise(self.gates.values, self.sparsity)

    @property
    def window(self) -> int:
        """Slots of a streaming head besides its sinks.

        As released, a new token sees the `recent` tokens before it and itself, so that it holds one more until the
        next comes; the paper's mask counts the token itself among the recent ones.
        """
        return self.recent + (self.prefill == "released")

    @override
    def check(self, config: PretrainedConfig) -> None:
        ours, theirs = tuple(self.gates.values.shape), (config.num_hidden_layers, kv_heads(config))
        if ours != theirs:
            raise ValueError(
                f"the gates are for {ours[0]} layers x {ours[1]} KV heads, the model has {theirs[0]} x {theirs[1]}; "
                "train gates for it (regard train duo_attention) or give a folder of published ones"
            )

    @override
    def layer(self, config: PretrainedConfig, index: int) -> DuoLayer:
        return DuoLayer(self.retrieval[index].tolist(), self.sinks, self.window, self.prefill)

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        full = int(self.retrieval.sum())
        streaming = self.retrieval.numel() - full
        slots = full * tokens + streaming * min(tokens, self.sinks + self.window)
        return 2 * head_dim(config) * itemsize * batch * slots

    @override
    def unlimited(self) -> DuoAttention:
        return dataclasses.replace(self, sparsity=0.0)

    @override
    def with_budget(self, tokens: int, context: int) -> DuoAttention:
        """The policy with as many retrieval heads as hold, with what the others keep, `tokens` of the context.

        The others keep no more than the gates were trained with, nor than the budget.
        """
        require_budget(tokens, context)
        sinks = min(self.sinks, self.gates.sinks, tokens - 1)
        policy = dataclasses.replace(self, sinks=sinks, recent=min(self.recent, self.gates.recent, tokens - sinks))
        kept = min(policy.sinks + policy.window, context)
        share = 1.0 if kept == context else min(max((tokens - kept) / (context - kept), 0.0), 1.0)
        return dataclasses.replace(policy, sparsity=1.0 - share)

    def split(self, cache: PolicyCache) -> PolicyCache:
        """A cache of this policy, as if the prompt had been read under it in one released chunk.

        `cache` is that of `unlimited()` after the whole prompt, and stays as it is. As released, the first chunk gives
        the same keys and values whichever heads stream, so that several choices of heads can share one prefill.
        """
        if self.prefill != "released":
            raise ValueError(f"only the released prefill can be shared, prefill is {self.prefill!r}")
        if len(cache.layers) != len(self.retrieval):
            raise ValueError(f"cache was made for {len(cache.layers)} layers, the gates for {len(self.retrieval)}")
        layers: list[KVLayer] = []
        for heads, full in zip(self.retrieval.tolist(), cache.layers, strict=True):
            if not isinstance(full, DuoLayer) or full.reduced is not None or full.full.keys is None:
                raise ValueError("cache must be that of unlimited(), after it has read the prompt")
            layer = DuoLayer(heads, self.sinks, self.window, self.prefill)
            layer.take_over(full)
            layers.append(layer)
        return cache.with_layers(layers)

    @override
    def fit(self, model: PreTrainedModel, texts: Sequence[str]) -> DuoAttention:
        """The policy with gates trained on this model, on passkeys hidden in the texts; see `training.fit_gates`."""
        from regard.papers.duo_attention.training import fit_gates

        return dataclasses.replace(self, gates=fit_gates(model, texts, sinks=self.sinks, recent=self.recent))

    @override
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the options to `policy.json` and the gates, in the authors' format, beside it."""
        save_gates(self.gates, folder)
        names = [option.name for option in dataclasses.fields(self) if option.name != "gates"]
        options = {"policy": type(self).__name__, **{name: getattr(self, name) for name in names}}
        write_atomically(Path(folder) / "policy.json", json.dumps(options, indent=1) + "\n")

    @classmethod
    @override
    def load(cls, folder: str | os.PathLike[str]) -> DuoAttention:
        return cls(gates=load_gates(folder), **cls.read_options(folder))


class Ring(SinksAndRecentStore):
    """The sinks and the recent tokens of streaming heads, which can also be read in the order of their positions."""

    def first(self) -> tuple[Float[Tensor, "batch heads first dim"], Float[Tensor, "batch heads first dim_v"]]:
        """The sinks held so far."""
        assert self.keys is not None and self.values is not None
        held = min(self.sinks, self.used)
        return self.decode(self.keys[:, :, :held], self.values[:, :, :held])

    def first_positions(self, device: Any = None) -> Int[Tensor, " first"] | Int[Tensor, "batch 1 first"]:
        """The positions of the sinks held so far; -1 where a row has none there yet."""
        return self.positions(device)[..., : min(self.sinks, self.used)]

    def last(
        self, number: int
    ) -> tuple[
        Float[Tensor, "batch heads last dim"], Float[Tensor, "batch heads last dim_v"], Int[Tensor, "*rows last"]
    ]:
        """The last tokens, in order, and their positions: at most `number`, and none that is a sink.

        Rows of a padded batch may have a token at one position that is a sink or padding; its position is then -1.
        """
        assert self.keys is not None and self.values is not None
        device = self.keys.device
        if self.padding is None:
            place = torch.arange(max(self.seen - number, min(self.sinks, self.seen)), self.seen, device=device)
            slot = self._slot(place)
            return *self.decode(self.keys.index_select(2, slot), self.values.index_select(2, slot)), place
        place = torch.arange(max(self.seen - number, 0), self.seen, device=device)
        local = place - self.padding[:, None]
        slot = self._slot(local.clamp(min=0))[:, None].expand(-1, self.keys.shape[1], -1)
        return *self.chosen(slot), torch.where(local < self.sinks, -1, place)[:, None]

    def _slot(self, local: Int[Tensor, "*places"]) -> Int[Tensor, "*places"]:
        return torch.where(local < self.sinks, local, self.sinks + (local - self.sinks) % self.recent)

    def follow(self, padding: Int[Tensor, " batch"] | None) -> None:
        """Takes the rows' left padding from another store that has read the same prompt."""
        self.padding, self._still_padding = padding, False


class DuoLayer(SplitLayer):
    """The cache of one layer: a growing store for retrieval heads, a ring after the sinks for streaming heads."""

    def __init__(self, retrieval: Sequence[bool], sinks: int, window: int, prefill: Prefill) -> None:
        super().__init__(retrieval)
        self.prefill = prefill
        self.ring = Ring(sinks, window)

    @property
    @override
    def stores(self) -> Sequence[Store]:
        return self.full, self.ring

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be taken back: as long as the streaming heads have dropped none."""
        return self.reduced is None or self.ring.seen <= self.ring.size

    @override
    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads queries dim"],
        value: Float[Tensor, "batch kv_heads queries dim_v"],
        visible: Visible,
        scale: float,
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        self.ring.begin(visible)
        if self.seen == 0 and self.prefill == "released":
            self._keep(key, value)
            return attend(query, key, value, mask=visible.over(), scale=scale)
        return self.attend_split(query, key, value, visible, scale)

    @override
    def attend_reduced(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float) -> Tensor:
        ring = self.ring
        plain = visible.plain and ring.padding is None
        if query.shape[2] == 1:  # all that the ring holds then is what the new token may see
            keys, values = ring.write(key, value)
            return attend(query, keys, values, mask=None if plain else _over_ring(visible, ring), scale=scale)
        if self.prefill == "streaming":
            last, last_values, _ = ring.last(ring.recent - 1) if self.seen else (key[:, :, :0], value[:, :, :0], None)
            ring.write(key, value)
            return streaming_attention(
                query,
                torch.cat([last, key], dim=2),
                torch.cat([last_values, value], dim=2),
                *ring.first(),
                recent=ring.recent,
                visible=visible,
                scale=scale,
            )
        last, last_values, positions = ring.last(ring.recent - 1)
        first, first_values, first_positions = *ring.first(), ring.first_positions(query.device)
        keys, values = torch.cat([first, last, key], dim=2), torch.cat([first_values, last_values, value], dim=2)
        ring.write(key, value)
        if plain:
            return attend(query, keys, values, mask=causal(), scale=scale)
        new = torch.arange(visible.first, visible.seen, device=query.device)
        held = [place.expand(key.shape[0], 1, -1) for place in (first_positions, positions, new)]
        return attend(query, keys, values, mask=visible.at(torch.cat(held, dim=-1)), scale=scale)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        """Takes in the first chunk, once all its heads have seen it."""
        if self.whole is not None:
            self.full.append(key[:, self.whole], value[:, self.whole])
        if self.reduced is not None:
            self.ring.write(key[:, self.reduced], value[:, self.reduced])

    def take_over(self, other: DuoLayer) -> None:
        """Holds what it would hold, had it been given the tokens that `other` holds for all heads."""
        keys, values = other.full.everything()
        self.lazy_initialization(keys, values)
        self.ring.follow(other.ring.padding)
        self._keep(keys, values)
        self.seen = other.seen

    @override
    def crop_reduced(self, tokens: int) -> None:
        self.ring.crop(tokens)


_masks: WeakKeyDictionary[Visible, Bool[Tensor, "rows heads 1 keys"]] = WeakKeyDictionary()


def _over_ring(visible: Visible, ring: Ring) -> Bool[Tensor, "rows heads 1 keys"]:
    """The mask over the slots in use, which all layers of one forward pass share."""
    if visible not in _masks:
        _masks[visible] = visible.at(ring.positions(visible.device))
    return _masks[visible]
