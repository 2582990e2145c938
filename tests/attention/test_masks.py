"""Masks: one rule gives the tensor, its chunks and the block mask; the algebra is that of booleans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.attention.masks import Mask, block, causal, document, prefix, sinks_and_window, window

LENGTH = 300
"""Three blocks, the last one short."""


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed))


simple = st.one_of(
    st.just(causal()),
    st.integers(1, 200).map(window),
    st.integers(0, 200).map(prefix),
    st.builds(sinks_and_window, st.integers(0, 150), st.integers(1, 150)),
    st.integers(0, 9).map(lambda seed: document(some_ids(2, LENGTH, seed=seed))),
    st.integers(0, 9).map(lambda seed: document(some_ids(LENGTH, seed=seed).sort().values)),
    st.integers(0, 9).map(lambda seed: block(some_ids(10, 10, seed=seed) > 0, 32)),
    st.just(Mask(lambda batch, head, query, key: (query + key) % (head + 2) == 0, heads=3)),
)
masks = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda mask: ~mask),
    ),
    max_leaves=3,
)
sizes = st.integers(0, LENGTH).flatmap(lambda keys: st.tuples(st.integers(0, keys), st.just(keys)))


def densified(blocks, batch: int, heads: int) -> torch.Tensor:
    """The boolean tensor that FlexAttention computes with: whole blocks, and others where `mask_mod` allows."""
    size = blocks.BLOCK_SIZE[0]
    queries, keys = blocks.seq_lengths
    index = [torch.arange(n) for n in (batch, heads, queries, keys)]
    where = (index[0][:, None, None, None], index[1][:, None, None], index[2][:, None], index[3])
    allowed = blocks.mask_mod(*where).expand(batch, heads, queries, keys)
    dense = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for counts, chosen, whole in (
        (blocks.kv_num_blocks, blocks.kv_indices, False),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, True),
    ):
        counts, chosen = counts.expand(batch, heads, -1), chosen.expand(batch, heads, -1, -1)
        for row, head, down in torch.cartesian_prod(*[torch.arange(n) for n in counts.shape]).tolist():
            for across in chosen[row, head, down, : counts[row, head, down]].tolist():
                tile = (row, head, slice(down * size, (down + 1) * size), slice(across * size, (across + 1) * size))
                dense[tile] |= allowed[tile] | whole
    return dense


@given(mask=masks, size=sizes.filter(lambda size: size[0] > 0))
def test_the_block_mask_is_the_tensor(mask, size):
    tensor = mask.tensor(*size, batch=2, heads=3).expand(2, 3, *size)
    assert torch.equal(densified(mask.block_mask(*size, batch=2, heads=3), 2, 3), tensor)


@given(mask=masks, size=sizes)
def test_the_block_table_says_where_some_and_where_every_pair_is_allowed(mask, size):
    some, every = mask.block_table(*size, batch=2, heads=3)
    tensor = mask.tensor(*size, batch=2, heads=3)
    for down in range(some.shape[2]):
        for across in range(some.shape[3]):
            tile = tensor[..., down * 128 : (down + 1) * 128, across * 128 : (across + 1) * 128]
            assert torch.equal(some[..., down, across], tile.any(-1).any(-1))
            assert torch.equal(every[..., down, across], tile.all(-1).all(-1) & (tile.shape[2:] == (128, 128)))


@given(one=masks, other=masks, size=sizes)
def test_the_algebra_is_boolean(one, other, size):
    a, b = one.tensor(*size, batch=2, heads=3), other.tensor(*size, batch=2, heads=3)
    assert torch.equal((one & other).tensor(*size, batch=2, heads=3), a & b)
    assert torch.equal((one | other).tensor(*size, batch=2, heads=3), a | b)
    assert torch.equal((~one).tensor(*size, batch=2, heads=3), ~a)


@given(mask=masks, size=sizes, cut=st.floats(0, 1))
def test_chunks_of_queries_stack_to_the_whole(mask, size, cut):
    queries, keys = size
    first = int(cut * queries)
    whole = mask.tensor(queries, keys, batch=2, heads=3)
    offset = keys - queries
    chunks = [
        mask.tensor(first, keys, offset=offset, batch=2, heads=3),
        mask.tensor(queries - first, keys, batch=2, heads=3),  # aligned to the end
    ]
    assert torch.equal(torch.cat(chunks, dim=2), whole)


@given(mask=masks, seed=st.integers(0, 99), shape=st.sampled_from([(5,), (2, 5), (2, 3, 5)]))
def test_scattered_positions_pick_from_the_whole(mask, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    key_positions = torch.randint(0, LENGTH, shape, generator=generator)
    query_positions = torch.randint(0, LENGTH, (4,), generator=generator)
    whole = mask.tensor(LENGTH, LENGTH, batch=2, heads=3).expand(2, 3, -1, -1)
    rows = whole[:, :, query_positions]
    expected = (
        rows.gather(3, key_positions.expand(2, 3, 5)[:, :, None].expand(-1, -1, 4, -1))
        if len(shape) != 2
        else (rows.gather(3, key_positions[:, None, None].expand(2, 3, 4, 5)))
    )
    given_by_mask = mask.tensor_at(query_positions, key_positions, batch=2, heads=3)
    assert torch.equal(given_by_mask.expand(2, 3, 4, 5), expected)


def pattern(mask: Mask, queries: int, keys: int, **options: int) -> list[str]:
    """One string per query: x for a visible key, . for a hidden one."""
    (rows,) = mask.tensor(queries, keys, **options)[:, 0]
    return ["".join("x" if allowed else "." for allowed in row) for row in rows.tolist()]


def test_worked_examples():
    assert pattern(causal(), 3, 3) == ["x..", "xx.", "xxx"]
    assert pattern(causal(), 2, 4) == ["xxx.", "xxxx"]  # the last two queries
    assert pattern(causal(), 2, 4, offset=0) == ["x...", "xx.."]
    assert pattern(window(1), 3, 3) == ["x..", ".x.", "..x"]
    assert pattern(window(2), 4, 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert pattern(prefix(2), 2, 4) == ["xx..", "xx.."]
    assert pattern(prefix(2) | causal(), 4, 4) == ["xx..", "xx..", "xxx.", "xxxx"]
    assert pattern(sinks_and_window(1, 2), 5, 5) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    assert pattern(sinks_and_window(0, 2), 3, 3) == pattern(window(2), 3, 3)
    assert pattern(document(torch.tensor([0, 0, 1, 0])), 4, 4) == ["xx.x", "xx.x", "..x.", "xx.x"]
    assert pattern(block(torch.tensor([[True, False], [True, True]]), 2), 4, 4) == ["xx..", "xx..", "xxxx", "xxxx"]
    assert pattern(~causal(), 3, 3) == [".xx", "..x", "..."]


def test_documents_differ_by_batch_row_and_ids_may_cover_later_chunks():
    mask = document(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))
    chunk = mask.tensor(1, 3)
    assert chunk.shape == (2, 1, 1, 3)
    assert chunk[:, 0, 0].tolist() == [[False, False, True], [False, True, True]]


def test_a_mask_is_made_once_and_what_is_made_from_it_is_kept():
    assert window(5) is window(5)
    assert causal() is causal()
    assert window(5).block_mask(40, 40) is window(5).block_mask(40, 40)
    assert window(5).block_mask(40, 40) is not window(5).block_mask(40, 41)
    for keys in range(40, 60):  # decoding must not hold on to every length
        window(5).block_mask(1, keys)
    assert len(window(5)._made) <= 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), "window must be positive, got 0"),
        (lambda: prefix(-1), "prefix must not be negative, got -1"),
        (lambda: sinks_and_window(-1, 4), "sinks must not be negative, got -1"),
        (lambda: sinks_and_window(4, 0), "recent must be positive, got 0"),
        (lambda: block(torch.ones(2, 2, dtype=torch.bool), 0), "size must be positive, got 0"),
        (lambda: causal().tensor(-1, 3), "must not be negative, got -1 queries and 3 keys"),
        (lambda: causal().tensor(5, 3), "5 queries cannot be the last of 3 keys: give the offset"),
        (lambda: causal().tensor(2, 3, offset=-1), "offset must not be negative, got -1"),
        (lambda: causal().block_mask(0, 3), "a block mask needs queries and keys, got 0 queries and 3 keys"),
        (lambda: document(torch.zeros(4).long()).tensor(5, 5), "the mask is for 4 query positions, got 5"),
        (lambda: document(torch.zeros(4).long()).tensor(1, 5, offset=0), "the mask is for 4 key positions, got 5"),
        (lambda: document(torch.zeros(2, 4).long()).tensor(4, 4, batch=3), "the mask is for batch of 2, got 3"),
        (
            lambda: document(torch.zeros(2, 4).long()) & document(torch.zeros(3, 4).long()),
            "the mask is for batch of 2, got 3",
        ),
        (lambda: block(torch.ones(2, 3, dtype=torch.bool), 4).tensor(9, 12), "the mask is for 8 query positions"),
    ],
)
def test_bad_sizes_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_that_returns_numbers_is_refused():
    with pytest.raises(TypeError, match=r"the rule of a mask must return a boolean tensor, got torch\.int64"):
        Mask(lambda batch, head, query, key: query - key).tensor(2, 2)
