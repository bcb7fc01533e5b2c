"""Nested containers as lists of leaves."""

from __future__ import annotations

from diffopt._torch.feature import private

_MODULE, _FEATURE = "torch.utils._pytree", "batches"

tree_flatten = private(_MODULE, "tree_flatten", _FEATURE)
tree_unflatten = private(_MODULE, "tree_unflatten", _FEATURE)
tree_leaves = private(_MODULE, "tree_leaves", _FEATURE)
tree_map = private(_MODULE, "tree_map", _FEATURE)
