"""Functions on parameters as nested dicts (`nnx.to_pure_dict`): leaves, split and join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Params = dict[Any, Any]

Keys = tuple[Any, ...]
"""The path of a leaf, such as ('blocks', 0, 'norm1', 'scale')."""


def leaves(params: Params, prefix: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yields every path and leaf."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def from_leaves(entries: dict[Keys, Any]) -> Params:
    """Returns the nested dicts of paths and leaves; the inverse of `leaves`."""
    params: Params = {}
    for keys, leaf in entries.items():
        tree = params
        for name in keys[:-1]:
            tree = tree.setdefault(name, {})
        tree[keys[-1]] = leaf
    return params


def split(params: Params, condition: Callable[[Keys], bool]) -> tuple[Params, Params]:
    """Returns the leaves whose path fulfils the condition, and the other leaves."""
    chosen = {keys: leaf for keys, leaf in leaves(params) if condition(keys)}
    others = {keys: leaf for keys, leaf in leaves(params) if keys not in chosen}
    return from_leaves(chosen), from_leaves(others)


def join(*parts: Params) -> Params:
    """Returns the union of parts with different leaves; the inverse of `split`."""
    return from_leaves({keys: leaf for part in parts for keys, leaf in leaves(part)})
