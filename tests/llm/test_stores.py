"""The stores against a list of tokens: what they hold, in which positions, in how many bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function

from regard.llm.cache import GrowingStore, SinksAndRecentStore
from regard.llm.visible import Visible


def tokens(start: int, stop: int, batch: int = 2) -> torch.Tensor:
    """Keys whose every channel is their own position, told apart by row."""
    position = torch.arange(start, stop, dtype=torch.float32)
    return (position[None, :] + 1000 * torch.arange(batch)[:, None])[:, None, :, None].expand(batch, 1, -1, 4)


def seen_so_far(first: int, queries: int, padding: torch.Tensor | None = None) -> Visible:
    return Visible(causal_mask_function, first, queries, padding, "cpu")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_a_growing_store_holds_everything_in_order(chunks, block):
    store, seen = GrowingStore(block), 0
    for chunk in chunks:
        new = tokens(seen, seen + chunk)
        keys, values = store.append(new, -new)
        seen += chunk
        assert torch.equal(keys, tokens(0, seen)) and torch.equal(values, -tokens(0, seen))
        assert store.bytes_held == 2 * 2 * seen * 4 * 4
        assert store.bytes_allocated <= 2 * 2 * (seen + block) * 4 * 4
    store.crop(seen // 2)
    assert torch.equal(store.append(tokens(0, 0), tokens(0, 0))[0], tokens(0, seen - seen // 2))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(0, 4),
    st.integers(1, 5),
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_sinks_and_recent_hold_exactly_these_positions(chunks, sinks, recent, pads):
    total = sum(chunks)
    real = torch.arange(total)[None] >= torch.tensor(pads)[:, None]
    store, seen = SinksAndRecentStore(sinks, recent), 0
    for chunk in chunks:
        if chunk == 0:
            continue
        padding = None if not any(pads) else real[:, : seen + chunk]
        store.begin(seen_so_far(seen, chunk, padding))
        new = tokens(seen, seen + chunk)
        keys, _ = store.write(new, new)
        seen += chunk
        positions = store.positions()
        for row, pad in enumerate(pads):
            expected = {p for p in range(pad, seen) if p - pad < sinks or p >= seen - recent}
            held = positions if positions.ndim == 1 else positions[row, 0]
            assert {int(p) for p in held if p >= 0} == expected
            for slot, position in enumerate(held):
                if position >= 0:
                    assert keys[row, 0, slot, 0] == position + 1000 * row
        assert store.bytes_held <= 2 * 2 * (sinks + recent) * 4 * 4


def test_rows_are_selected_with_their_padding():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    store = SinksAndRecentStore(1, 1)
    store.begin(seen_so_far(0, 3, padding))
    store.write(tokens(0, 3), tokens(0, 3))
    store.map_rows(lambda tensor: tensor.index_select(0, torch.tensor([1, 0, 1])))
    assert store.padding.tolist() == [0, 1, 0]
    assert store.positions()[:, 0].tolist() == [[0, 2], [1, 2], [0, 2]]


def test_reset_frees_the_buffers():
    store = GrowingStore()
    store.append(tokens(0, 3), tokens(0, 3))
    store.reset()
    assert store.bytes_allocated == 0 and store.used == 0


def test_visible_hides_the_future_padding_and_empty_slots():
    padding = torch.tensor([[False, True, True, True]])
    visible = seen_so_far(2, 2, padding)
    mask = visible.at(torch.tensor([0, 1, 3, -1]))
    assert mask[0, 0].tolist() == [[False, True, False, False], [False, True, True, False]]
    assert visible.left_padding().tolist() == [1]


@pytest.mark.parametrize(("queries", "kind"), [(1, type(None)), (3, object)])
def test_a_plain_rule_needs_no_tensor(queries, kind):
    assert isinstance(seen_so_far(4, queries).over(), kind) and seen_so_far(4, queries).plain
