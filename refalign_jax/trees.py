"""Nested dicts of arrays, and their flat form {"a/b/c": leaf}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested dict into {"a/b/c": leaf}, in its order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
