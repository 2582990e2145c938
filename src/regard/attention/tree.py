"""Trees of tensors: states, caches, batches. The one file that touches torch's private pytree module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree

__all__ = ["tree_bytes", "tree_leaves", "tree_map"]


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree (NamedTuples, tuples, lists, dicts) with `fn(leaf, *leaves of rest)` in place of each leaf.

    None stands for "nothing here" and stays None. Raises ValueError where a tree of `rest` has another structure.
    """
    return _pytree.tree_map(lambda leaf, *others: None if leaf is None else fn(leaf, *others), tree, *rest)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves in a fixed order, without the Nones."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if leaf is not None]


def tree_bytes(tree: Any) -> int:
    """Bytes of all tensors in the tree, as many as they show: a view counts its own elements, not its storage."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
