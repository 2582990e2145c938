"""Key-value caches that hold what a policy promises: the layer contract, the stores, and the counting of bytes."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from typing_extensions import override

from regard.llm.codec import AS_IS, Codec
from regard.llm.visible import Visible


class Store:
    """Keys and values of some heads, in preallocated buffers [batch, heads, capacity, dim]; rows are sequences.

    Buffers hold what the codec makes of keys and values: as they come where nothing else is set.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.used = 0
        """Slots that hold a token, the same in every row: slots 0 to used - 1."""
        self.codec: Codec = AS_IS
        self.dtype: torch.dtype | None = None
        """Of the keys and values that came."""

    def encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as the buffers hold them."""
        self.dtype = key.dtype
        return self.codec.encode(key), self.codec.encode(value)

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values out of parts of the buffers."""
        assert self.dtype is not None
        return self.codec.decode(keys, self.dtype), self.codec.decode(values, self.dtype)

    def everything(
        self,
    ) -> tuple[Float[Tensor, "batch heads used dim"], Float[Tensor, "batch heads used dim_v"]]:
        """The slots in use."""
        assert self.keys is not None and self.values is not None
        return self.decode(self.keys[:, :, : self.used], self.values[:, :, : self.used])

    def chosen(
        self, slots: Int[Tensor, "batch heads chosen"]
    ) -> tuple[Float[Tensor, "batch heads chosen dim"], Float[Tensor, "batch heads chosen dim_v"]]:
        """Keys and values of some slots, of every row and head its own; only these are decoded."""
        assert self.keys is not None and self.values is not None
        index = slots.long()[..., None]
        return self.decode(
            self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[-1])),
            self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[-1])),
        )

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by `change` of it: a selection, repetition or reordering of rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def reset(self) -> None:
        """Forgets everything, and frees the buffers."""
        self.keys = self.values = None
        self.used = 0

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values held, empty slots not counted."""
        if self.keys is None or self.values is None or self.keys.shape[2] == 0:
            return 0
        per_slot = (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]
        return per_slot * self.used

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the buffers, empty slots included."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


class GrowingStore(Store):
    """All tokens, in order of arrival. Grows by whole blocks, so one token costs a write into a slot.

    Moving the buffer every `block` tokens costs 2/block of what attention reads anyway, and at most a block is idle.
    """

    def __init__(self, block: int = 256) -> None:
        super().__init__()
        self.block = block

    def append(
        self, key: Float[Tensor, "batch heads new dim"], value: Float[Tensor, "batch heads new dim_v"]
    ) -> tuple[Float[Tensor, "batch heads used dim"], Float[Tensor, "batch heads used dim_v"]]:
        """Everything held, the new tokens last: views, where nothing has to be decoded."""
        key, value = self.encode(key, value)
        used = self.used + key.shape[2]
        self.keys = self._with_room(self.keys, key, used)
        self.values = self._with_room(self.values, value, used)
        self.keys[:, :, self.used : used] = key
        self.values[:, :, self.used : used] = value
        self.used = used
        return self.everything()

    def _with_room(self, buffer: Tensor | None, new: Tensor, used: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= used:
            return buffer
        capacity = -(-used // self.block) * self.block
        larger = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            larger[:, :, : self.used] = buffer[:, :, : self.used]
        return larger

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`."""
        self.used = max(self.used - tokens, 0)


class SinksAndRecentStore(Store):
    """The first `sinks` and the last `recent` tokens of every row, in a buffer of that size: a ring after the sinks.

    Keys keep the rotation of the position they came with. A row's sinks are its first tokens after left padding.
    Until the ring turns, slots fill in order of arrival.
    """

    def __init__(self, sinks: int, recent: int) -> None:
        super().__init__()
        self.sinks = sinks
        self.recent = recent
        self.seen = 0
        self.padding: Int[Tensor, " batch"] | None = None
        """Left padding of every row; None where there is none."""
        self._still_padding = True

    @property
    def size(self) -> int:
        """Slots of a row."""
        return self.sinks + self.recent

    @property
    def full(self) -> bool:
        """Whether every slot of every row holds a token, so that nothing needs a mask."""
        return self.padding is None and self.used == self.size

    def begin(self, visible: Visible) -> None:
        """Takes the rows' left padding, which their first chunks bring."""
        if self._still_padding:
            self.padding = visible.left_padding()
            self._still_padding = self.padding is not None and bool((self.padding == visible.seen).any())

    def write(
        self, key: Float[Tensor, "batch heads new dim"], value: Float[Tensor, "batch heads new dim_v"]
    ) -> tuple[Float[Tensor, "batch heads used dim"], Float[Tensor, "batch heads used dim_v"]]:
        """The slots in use, after the new tokens took their places: views, where nothing has to be decoded."""
        key, value = self.encode(key, value)
        new = key.shape[2]
        if self.keys is None or self.values is None:
            self.keys = key.new_zeros(*key.shape[:2], self.size, key.shape[3])
            self.values = value.new_zeros(*value.shape[:2], self.size, value.shape[3])
        if self.padding is None:
            for source, target, length in self._pieces(new):
                self.keys[:, :, target : target + length] = key[:, :, source : source + length]
                self.values[:, :, target : target + length] = value[:, :, source : source + length]
        else:
            self._write_rows(key, value)
        self.seen += new
        self.used = min(self.seen, self.size)
        return self.everything()

    def _pieces(self, new: int) -> list[tuple[int, int, int]]:
        """(source, target, length) of the copies that put `new` tokens in place, where no row is padded."""
        pieces = []
        to_sinks = min(max(self.sinks - self.seen, 0), new)
        if to_sinks:
            pieces.append((0, self.seen, to_sinks))
        source = max(to_sinks, new - self.recent)
        while source < new:
            slot = (self.seen + source - self.sinks) % self.recent
            length = min(new - source, self.recent - slot)
            pieces.append((source, self.sinks + slot, length))
            source += length
        return pieces

    def _write_rows(self, key: Tensor, value: Tensor) -> None:
        assert self.padding is not None and self.keys is not None and self.values is not None
        new, sinks, recent = key.shape[2], self.sinks, self.recent
        token = torch.arange(new, device=key.device)
        local = self.seen + token[None] - self.padding[:, None]
        slot = torch.where(local < sinks, local, sinks + (local - sinks).remainder(max(recent, 1)))
        kept = (local >= 0) & ((local < sinks) | (token[None] >= new - recent))
        row, source = kept.nonzero(as_tuple=True)
        target = slot[row, source]
        self.keys[row, :, target] = key[row, :, source]
        self.values[row, :, target] = value[row, :, source]

    def positions(self, device: Any = None) -> Int[Tensor, " used"] | Int[Tensor, "batch 1 used"]:
        """The position of the token in every slot in use; -1 where a row has none there yet."""
        slot = torch.arange(self.used, device=device)
        if self.padding is None:
            return self._position(slot, torch.tensor(self.seen, device=device))
        local = self._position(slot[None], (self.seen - self.padding)[:, None])
        return torch.where(local >= 0, local + self.padding[:, None], -1)[:, None]

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`. Raises ValueError where they have pushed out tokens that must come back."""
        if self.seen > self.size:
            raise ValueError(
                f"tokens have been dropped, so the last {tokens} cannot be taken back: decode without candidates, or "
                f"keep more than {self.recent} recent tokens"
            )
        self.seen = max(self.seen - tokens, 0)
        self.used = self.seen

    def _position(self, slot: Tensor, seen: Tensor) -> Tensor:
        """Position, counted from a row's first token, of what a slot holds after `seen` tokens of that row."""
        ring = slot - self.sinks
        turns = torch.div(seen - 1 - self.sinks - ring, max(self.recent, 1), rounding_mode="floor")
        held = torch.where(ring < 0, slot, self.sinks + ring + turns * self.recent)
        empty = torch.where(ring < 0, slot >= seen, turns < 0)
        return torch.where(empty, -1, held)

    @override
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        if self.padding is not None:
            self.padding = change(self.padding)

    @override
    def reset(self) -> None:
        super().reset()
        self.seen, self.padding, self._still_padding = 0, None, True


class KVLayer(CacheLayerMixin):
    """The cache of one model layer under a policy. A policy writes `attend` and names its `stores`.

    transformers' attention function never receives the cache, and `Cache.update` never sees the queries: so `update`
    keeps the new keys and values and returns this layer in their place, and the attached attention function calls
    `step`, which calls `attend`.
    """

    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        """Tokens of the padded sequence so far, whether or not they are still held."""
        self.batch: int | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads queries dim"],
        value: Float[Tensor, "batch kv_heads queries dim_v"],
        visible: Visible,
        scale: float,
    ) -> Float[Tensor, "batch heads queries dim_v"]:
        """The attention of the new queries over the new tokens and those held.

        Stores of the new tokens what the policy keeps. `self.seen` counts the tokens before these.
        """

    @property
    @abstractmethod
    def stores(self) -> Sequence[Store]:
        """Everything that holds keys and values."""

    @property
    def bookkeeping(self) -> Sequence[Tensor]:
        """Other tensors that must be kept from token to token: positions, scores. Batch first."""
        return ()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies a selection, repetition or reordering of rows to everything kept."""
        for store in self.stores:
            store.map_rows(change)

    def step(self, module: nn.Module, query: Tensor, visible: Visible, scale: float) -> Tensor:
        """What the attached attention function calls: `attend`, then the count of tokens."""
        if self._new is None:
            raise ValueError(f"{type(module).__name__} reads the keys of another layer, which no policy can follow")
        key, value = self._new
        self._new = None
        out = self.attend(module, query, key, value, visible, scale)
        self.seen += key.shape[2]
        return out

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch:
            raise ValueError(f"this cache holds a batch of {self.batch}, got {key_states.shape[0]}; reset() it first")
        self._new = key_states, value_states
        return self, self

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @override
    def get_seq_length(self) -> int:
        return self.seen

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @override
    def get_max_length(self) -> int:
        return -1

    @override
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"{type(self).__name__} has evicted tokens: the last {-tokens_to_remove} cannot be taken back"
            )

    @override
    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        self.seen, self.batch, self._new, self.is_initialized = 0, None, None, False

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        self.batch = None if self.batch is None else self.batch * repeats

    @override
    def batch_select_indices(self, indices: Bool[Tensor, " batch"] | Int[Tensor, " chosen"]) -> None:
        self.map_rows(lambda tensor: tensor[indices.to(tensor.device)])
        if self.batch is not None:
            self.batch = int(indices.sum()) if indices.dtype == torch.bool else len(indices)

    @override
    def offload(self) -> None:
        raise ValueError(f"{type(self).__name__} does not offload; choose a policy that holds less")

    @override
    def prefetch(self) -> None:
        raise ValueError(f"{type(self).__name__} does not offload; choose a policy that holds less")


class PolicyCache(Cache):
    """A transformers cache made of policy layers, which knows how many bytes it holds."""

    layers: list[KVLayer]

    def __init__(self, layers: list[KVLayer], model: nn.Module | None = None) -> None:
        super().__init__(layers=layers)
        self._model = None if model is None else weakref.ref(model)

    def with_layers(self, layers: list[KVLayer]) -> PolicyCache:
        """A cache of these layers for the same model."""
        other = PolicyCache(layers)
        other._model = self._model
        return other

    def fits(self, model: nn.Module) -> bool:
        """Whether it was made for this model, as far as it was told for which."""
        made_for = None if self._model is None else self._model()
        return self._model is None or made_for is model

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values held now."""
        return sum(store.bytes_held for layer in self.layers for store in layer.stores)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the buffers, including slots that wait for the next tokens."""
        return sum(store.bytes_allocated for layer in self.layers for store in layer.stores)

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of what the policy keeps beside keys and values: positions, scores."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.bookkeeping)
