"""Trees: a map keeps the structure and the Nones, the leaves come in its order, bytes add up."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.attention.tree import tree_bytes, tree_leaves, tree_map


class State(NamedTuple):
    kv: torch.Tensor
    seen: torch.Tensor | None


leaves = st.integers(0, 3).map(lambda size: torch.arange(size)) | st.none()
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(State, inner, inner),
    ),
    max_leaves=8,
)


def written_out(tree) -> list[torch.Tensor]:
    """The tensors of a tree, by walking it."""
    if tree is None:
        return []
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in written_out(child)]


def shape(tree):
    """The tree with a word in place of each tensor: equal for trees of one structure."""
    if isinstance(tree, dict):
        return {key: shape(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree).__name__, [shape(child) for child in tree]
    return "tensor" if isinstance(tree, torch.Tensor) else tree


@settings(deadline=None)
@given(tree=trees)
def test_a_map_keeps_the_structure_and_visits_every_leaf(tree):
    doubled = tree_map(lambda leaf: leaf * 2, tree)
    assert shape(doubled) == shape(tree)
    assert [leaf.tolist() for leaf in written_out(doubled)] == [(leaf * 2).tolist() for leaf in written_out(tree)]
    assert [leaf.tolist() for leaf in tree_leaves(doubled)] == [(leaf * 2).tolist() for leaf in tree_leaves(tree)]
    assert {id(leaf) for leaf in tree_leaves(tree)} == {id(leaf) for leaf in written_out(tree)}
    summed = tree_map(lambda one, two, three: one + two + three, tree, doubled, doubled)
    assert [leaf.tolist() for leaf in tree_leaves(summed)] == [(leaf * 5).tolist() for leaf in tree_leaves(tree)]


@settings(deadline=None)
@given(tree=trees)
def test_bytes_are_those_of_all_tensors(tree):
    assert tree_bytes(tree) == sum(8 * leaf.numel() for leaf in written_out(tree))


def test_a_view_counts_what_it_shows_and_other_leaves_nothing():
    wide = torch.zeros(100, dtype=torch.bfloat16)
    assert tree_bytes([wide[:3], {"length": 7, "kind": "ring"}, None]) == 6


@pytest.mark.parametrize("other", [(torch.zeros(1),), [torch.zeros(1)], {"kv": torch.zeros(1)}, torch.zeros(1)])
def test_a_tree_of_another_structure_is_refused(other):
    with pytest.raises(ValueError):
        tree_map(lambda one, two: one + two, State(torch.zeros(1), torch.zeros(1)), other)
