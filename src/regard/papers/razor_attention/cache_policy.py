"""Serving under RazorAttention: all tokens for retrieval heads; sinks, recent tokens and a mean for all others."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override
from tyro.constructors import PrimitiveConstructorSpec

from regard.attention.attend import attend
from regard.attention.masks import Mask, causal
from regard.data.files import write_atomically
from regard.llm.cache import KVLayer, PolicyCache, Store
from regard.llm.policies.full import FullLayer
from regard.llm.policies.selected import SelectedStore
from regard.llm.policy import CachePolicy, head_dim, kv_heads, require_budget
from regard.llm.split import SplitLayer
from regard.llm.visible import Visible
from regard.papers.razor_attention.heads import FILE, Heads, find_heads, load_heads, save_heads

Compensation = Literal["weighted", "mean", "none"]

_AS_FLAG = PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME|FOLDER|FILE",
    instance_from_str=lambda given: find_heads(given[0]),
    is_instance=lambda given: isinstance(given, Heads),
    str_from_instance=lambda heads: [str(heads.settings.get("name", heads))],
)


@dataclass(frozen=True)
class RazorAttention(CachePolicy):
    """Full caches for the heads that retrieve; in all others one mean stands for what is neither first nor recent.

    A prompt's first chunk is read with full attention in all heads. Afterwards, a head that is not protected holds its
    first `sinks` tokens, its last max(`recent`, tokens / `compression`), and one compensation token: the mean of the
    keys and of the values of all others. Keys keep their positions, and are averaged after their rotation.

    Where the model's own rule hides old tokens, as in sliding-window layers, a query sees the compensation token only
    if it may see the oldest token in it, and so all of them.

    The chunks of a prompt matter, since later ones see the compressed cache and themselves; they do not until the first
    token is dropped, nor between two trims.

    Source: "RazorAttention", algorithm 1.
    """

    heads: Annotated[Heads, _AS_FLAG] = field(default_factory=lambda: find_heads("smollm2-135m-instruct"))
    """The heads that keep everything: a name that ships with this room, or a file (ours, msmodelslim's, golden-stick's)
    or the folder it is in."""
    recent: int = 4000
    """Last tokens that the other heads keep at least."""
    compression: float = 5.0
    """They keep one token in so many, where that is more; inf keeps the recent ones and no more, as released."""
    sinks: int = 4
    """First tokens that they keep."""
    compensation: Compensation = "weighted"
    """What stands for the dropped tokens: their mean, counted as often as there are (weighted, as in the paper), or
    once (mean, as released), or nothing (none)."""
    trim_every: int = 64
    """Tokens that go at once: so many, less one, may be held beyond the others."""

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1, the token itself, got {self.recent}")
        if not self.compression >= 1.0:
            raise ValueError(f"compression must be at least 1 (inf for a fixed buffer), got {self.compression}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.compensation not in get_args(Compensation):
            raise ValueError(f"compensation must be 'weighted', 'mean' or 'none', got {self.compensation!r}")
        if self.trim_every < 1:
            raise ValueError(f"trim_every must be at least 1 token, got {self.trim_every}")

    @classmethod
    def from_official(cls, file: str | os.PathLike[str], **options: Any) -> RazorAttention:
        """The policy with a published list of heads: msmodelslim's PyTorch file or golden-stick's JSON."""
        return cls(heads=load_heads(file), **options)

    @classmethod
    def of_heads(cls, protected: Bool[Tensor, "layers kv_heads"], **options: Any) -> RazorAttention:
        """The policy that keeps everything for exactly these heads."""
        return cls(heads=Heads.of_mask(protected), **options)

    @property
    def chunk_invariant(self) -> bool:  # type: ignore[override]
        """Whether the chunks of a prompt change nothing: where every head keeps everything."""
        return self.heads.shape is not None and len(self.heads.protected) == math.prod(self.heads.shape)

    def buffer(self, tokens: int) -> int:
        """Recent tokens that a reduced head keeps of so many in all.

        Source: algorithm 1, L_h.
        """
        return max(self.recent, int(tokens / self.compression))

    def most_held(self, tokens: int) -> int:
        """The most slots of a reduced head after so many tokens, the compensation token included."""
        untrimmed = self.sinks + self.buffer(tokens) + self.trim_every - 1
        return tokens if tokens <= untrimmed else untrimmed + (self.compensation != "none")

    @override
    def check(self, config: PretrainedConfig) -> None:
        self.heads.mask(config.num_hidden_layers, kv_heads(config))

    @override
    def layer(self, config: PretrainedConfig, index: int) -> RazorLayer:
        return RazorLayer(self, self.heads.mask(config.num_hidden_layers, kv_heads(config))[index].tolist())

    @override
    def promised_bytes(self, config: PretrainedConfig, batch: int, tokens: int, itemsize: int = 4) -> int:
        whole = len(self.heads.protected)
        reduced = config.num_hidden_layers * kv_heads(config) - whole
        slots = whole * tokens + reduced * self.most_held(tokens)
        return 2 * head_dim(config) * itemsize * batch * slots

    @override
    def unlimited(self) -> RazorAttention:
        return dataclasses.replace(self, recent=1 << 40)

    @override
    def with_budget(self, tokens: int, context: int) -> RazorAttention:
        """The policy whose heads hold `tokens` of the context on average.

        Protected heads stay, the most important ones first, as long as the others hold a quarter of the budget each.
        Raises ValueError, too, where the list of heads does not say how many heads the model has.
        """
        require_budget(tokens, context)
        if self.heads.shape is None:
            raise ValueError("a budget needs to know how many heads there are: give heads a shape, (layers, kv_heads)")
        if tokens >= context:
            return self.unlimited()
        every = math.prod(self.heads.shape)
        least = max(tokens // 4, 1)
        whole = min(len(self.heads.protected), every * (tokens - least) // (context - least))
        heads = dataclasses.replace(self.heads, protected=self.heads.protected[:whole])
        held = max((every * tokens - whole * context) // (every - whole), 1) if whole < every else tokens
        trim_every = min(self.trim_every, held // 8 + 1)
        sinks = min(self.sinks, held // 2)
        recent = max(held - sinks - (self.compensation != "none") - trim_every // 2, 1)
        compression = max(self.compression, context / recent)
        return dataclasses.replace(
            self, heads=heads, recent=recent, compression=compression, sinks=sinks, trim_every=trim_every
        )

    def split(self, cache: PolicyCache) -> PolicyCache:
        """A cache of this policy, as if it had read the prompt in one chunk that `Full` read, without padding.

        `cache` is that of `Full()` after the whole prompt, and stays as it is: all heads see all of the first chunk,
        so that several choices of heads can share one prefill.
        """
        read: list[FullLayer] = []
        for full in cache.layers:
            if not isinstance(full, FullLayer):
                raise ValueError(f"cache must be that of Full(), got layers of {type(full).__name__}")
            read.append(full)
        mask = self.heads.mask(len(read), read[0].store.everything()[0].shape[1])
        layers: list[KVLayer] = []
        for protected, full in zip(mask.tolist(), read, strict=True):
            layer = RazorLayer(self, protected)
            layer.take_over(full)
            layers.append(layer)
        return cache.with_layers(layers)

    @override
    def fit(self, model: PreTrainedModel, texts: Sequence[str]) -> RazorAttention:
        """The policy with the heads of this model, found with random tokens; the texts are not needed."""
        from regard.papers.razor_attention.search import find

        return dataclasses.replace(self, heads=find(model))

    @override
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the options to `policy.json` and the heads to `heads.json` beside it."""
        save_heads(self.heads, Path(folder) / FILE)
        names = [option.name for option in dataclasses.fields(self) if option.name != "heads"]
        options = {"policy": type(self).__name__, **{name: getattr(self, name) for name in names}}
        write_atomically(Path(folder) / "policy.json", json.dumps(options, indent=1) + "\n")

    @classmethod
    @override
    def load(cls, folder: str | os.PathLike[str]) -> RazorAttention:
        return cls(heads=load_heads(Path(folder) / FILE), **cls.read_options(folder))


class CompensatedStore(SelectedStore):
    """Tokens of reduced heads, the same in every head, whose first slot may be the mean of dropped ones."""

    def put(self, slot: int, key: Float[Tensor, "batch heads dim"], value: Float[Tensor, "batch heads dim_v"]) -> None:
        """Puts key and value in a slot of every row and head."""
        assert self.keys is not None and self.values is not None and self.dtype is not None
        self.keys[:, :, slot] = self.codec.encode(key.to(self.dtype))
        self.values[:, :, slot] = self.codec.encode(value.to(self.dtype))


@dataclass
class Dropped:
    """What is known of the tokens that every row has dropped; means in fp32."""

    count: Int[Tensor, " batch"]
    oldest: Int[Tensor, " batch"]
    """Position of the first one; -1 where a row has dropped none."""
    key: Float[Tensor, "batch heads dim"]
    value: Float[Tensor, "batch heads dim_v"]

    @classmethod
    def none(cls, keys: Tensor, values: Tensor) -> Dropped:
        """Of a batch of this shape, nothing so far."""
        count = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
        key, value = (torch.zeros_like(each[:, :, 0], dtype=torch.float32) for each in (keys, values))
        return cls(count, count - 1, key, value)

    def add(
        self,
        keys: Float[Tensor, "batch heads slots dim"],
        values: Float[Tensor, "batch heads slots dim_v"],
        leaves: Bool[Tensor, "batch slots"],
        positions: Int[Tensor, "batch slots"],
    ) -> None:
        """Takes the tokens that leave into the means.

        Source: "RazorAttention", algorithm 1: the compensation token.
        """
        count = self.count + leaves.sum(1)
        share = leaves / count.clamp(min=1)[:, None]
        old = (self.count / count.clamp(min=1))[:, None, None]
        self.key = old * self.key + torch.einsum("bs,bhsd->bhd", share, keys.float())
        self.value = old * self.value + torch.einsum("bs,bhsd->bhd", share, values.float())
        first = positions.masked_fill(~leaves, 1 << 30).amin(1)
        self.oldest = torch.where((self.count == 0) & (count > 0), first, self.oldest)
        self.count = count

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, batch first."""
        return [self.count, self.oldest, self.key, self.value]


class RazorLayer(SplitLayer):
    """The cache of one layer: all tokens for protected heads, sinks, recent tokens and a mean for the others."""

    def __init__(self, policy: RazorAttention, protected: Sequence[bool]) -> None:
        super().__init__(protected)
        self.policy = policy
        self.store = CompensatedStore()
        self._forget()

    def _forget(self) -> None:
        self.dropped: Dropped | None = None
        """None until a trim."""
        self.begin: Int[Tensor, " batch"] | None = None
        """Where the recent tokens of every row begin, counted from its first token after the padding."""
        self._next_look = 0
        """Tokens before which no row can be due for a trim."""
        self._has_mean = False
        """Whether the first slot is the compensation token."""
        self._gaps = False
        """Whether rows hold different numbers of tokens, so that some have empty slots."""

    @property
    @override
    def stores(self) -> Sequence[Store]:
        return self.full, self.store

    @property
    @override
    def bookkeeping(self) -> Sequence[Tensor]:
        kept = [] if self.dropped is None else self.dropped.tensors
        kept += [] if self.begin is None else [self.begin]
        return [*kept, self.store.held("positions")] if self.store.used else kept

    @override
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        self.begin = None if self.begin is None else change(self.begin)
        self.dropped = None if self.dropped is None else Dropped(*(change(each) for each in self.dropped.tensors))

    @override
    def reset(self) -> None:
        super().reset()
        self._forget()

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be taken back: until the first trim."""
        return self.reduced is None or self.dropped is None

    @override
    def crop_reduced(self, tokens: int) -> None:
        if self.dropped is not None:
            raise ValueError(
                f"tokens have been dropped, so the last {tokens} cannot be taken back: decode without candidates, or "
                f"keep more than {self.policy.recent} recent tokens"
            )
        self.store.used -= tokens

    @override
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        return self.attend_split(query, key, value, visible, scale)

    @override
    def attend_reduced(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float) -> Tensor:
        keys, values = self.store.append(key, value, self.seen)
        out = attend(query, keys, values, mask=self._mask(visible), bias=self._bias(query), scale=scale)
        self._trim(visible.seen, visible)
        return out

    def _mask(self, visible: Visible) -> Mask | Bool[Tensor, "rows 1 queries used"] | None:
        if self.dropped is None:
            return visible.over()
        if visible.plain and not self._gaps:
            return None if visible.queries == 1 else causal()  # all that is held came before the new tokens
        return visible.at(self.store.held("positions")[:, :1])

    def _bias(self, query: Tensor) -> Float[Tensor, "batch 1 1 used"] | None:
        """log(count) for the compensation token: attention as if that many copies of it were there.

        Source: "RazorAttention", the attention with the compensation token.
        """
        if self.dropped is None or not self._has_mean or self.policy.compensation == "mean":
            return None
        bias = query.new_zeros(len(query), 1, 1, self.store.used, dtype=torch.float32)
        bias[:, 0, 0, 0] = self.dropped.count.clamp(min=1).log()
        return bias

    def _trim(self, seen: int, visible: Visible | None = None) -> None:
        """Drops what has left the buffer, in rows where that is `trim_every` tokens."""
        policy, store = self.policy, self.store
        if seen < self._next_look and store.used <= policy.most_held(seen):
            return
        positions = store.held("positions")
        padding = None if visible is None else visible.left_padding()
        padding = positions.new_zeros(len(positions), dtype=torch.long) if padding is None else padding
        if self.begin is None:
            self.begin = torch.full_like(padding, policy.sinks)
        tokens = seen - padding
        buffers = torch.tensor([policy.buffer(length) for length in tokens.tolist()], device=padding.device)
        begin = (tokens - buffers).clamp(min=policy.sinks)
        outside = begin - self.begin
        due = outside >= policy.trim_every
        if bool(due.any()) or store.used > policy.most_held(seen):
            self.begin = torch.where(due, begin, self.begin)
            self._drop(padding, visible)
            outside = outside.masked_fill(due, 0)
        self._next_look = seen + policy.trim_every - int(outside.max())

    def _drop(self, padding: Int[Tensor, " batch"], visible: Visible | None) -> None:
        """Keeps the sinks and what is not before `begin`, and takes the rest into the means."""
        assert self.begin is not None
        store = self.store
        positions = store.held("positions")[:, 0].long()
        keys, values = store.held("keys"), store.held("values")
        token = positions >= 0
        if self.dropped is None:
            self.dropped = Dropped.none(keys, values)
        elif self._has_mean:
            token[:, 0] = False
        if visible is not None and visible.padding is not None:
            row = torch.arange(len(positions), device=positions.device)[:, None]
            token &= visible.padding.bool()[row, positions.clamp(min=0)]
        place = positions - padding[:, None]
        stays = token & ((place < self.policy.sinks) | (place >= self.begin[:, None]))
        self.dropped.add(keys, values, token & ~stays, positions)
        self._keep(stays, positions)

    def _keep(self, stays: Bool[Tensor, "batch used"], positions: Int[Tensor, "batch used"]) -> None:
        """Moves what stays to the front of the store, behind the mean of what has been dropped."""
        assert self.dropped is not None
        store, dropped = self.store, self.dropped
        slots = (~stays).long().sort(dim=1, stable=True).indices[:, : int(stays.sum(1).max())]
        held = torch.where(stays.gather(1, slots), positions.gather(1, slots), -1)
        self._has_mean = self.policy.compensation != "none" and bool((dropped.count > 0).any())
        if self._has_mean:
            slots = torch.cat([torch.zeros_like(slots[:, :1]), slots], dim=1)
            held = torch.cat([dropped.oldest[:, None], held], dim=1)
        spare = min(self.policy.trim_every, store.block - 1)
        store.keep(slots[:, None].expand(-1, dropped.key.shape[1], -1), spare)
        store.held("positions")[:] = held[:, None]
        if self._has_mean:
            store.put(0, dropped.key, dropped.value)
        self._gaps = bool((held < 0).any())

    def take_over(self, other: FullLayer) -> None:
        """Holds what it would hold, had it been given, without padding, the tokens that the other layer holds."""
        keys, values = other.store.everything()
        self.reset()
        self.lazy_initialization(keys, values)
        self.seen = other.seen
        if self.whole is not None:
            self.full.append(keys[:, self.whole], values[:, self.whole])
        if self.reduced is not None:
            self.store.append(keys[:, self.reduced], values[:, self.reduced], 0)
            self._trim(self.seen)
