"""Nested samples and batches: dicts, tuples, namedtuples, lists and dataclasses; anything else is a leaf.

`leaves` inspects them, `map_tree` and `map_named` rebuild them. Messages show paths: "image", "meta.boxes", "0.label".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def is_namedtuple(value: object) -> bool:
    """True for instances of `collections.namedtuple` and `typing.NamedTuple` classes."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_dataclass(value: object) -> bool:
    """True for dataclass instances, not for dataclass types."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def children(node: Any) -> list[tuple[str, Any]] | None:
    """The (name, child) pairs of a container, or None if `node` is a leaf."""
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    if is_namedtuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (tuple, list)):
        return [(str(position), child) for position, child in enumerate(node)]
    if is_dataclass(node):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def rebuild(node: Any, values: list[Any]) -> Any:
    """A container like `node` with `values` in place of its children, in the order of `children`.

    Mappings and lists keep their type if its constructor takes a plain dict or list, else they become one.
    """
    if isinstance(node, Mapping):
        plain = dict(zip(node, values, strict=True))
        return plain if type(node) is dict else _as_type(type(node), plain)
    if is_namedtuple(node):
        return type(node)._make(values)  # not the constructor: torch's PackedSequence overrides it
    if isinstance(node, tuple):
        return tuple(values)
    if isinstance(node, list):
        return values if type(node) is list else _as_type(type(node), values)
    # init=False fields cannot be passed to `replace`, so the copy is made as `copy.copy` does.
    clone = object.__new__(type(node))
    for field, value in zip(dataclasses.fields(node), values, strict=True):
        object.__setattr__(clone, field.name, value)
    return clone


def _as_type(kind: type, plain: Any) -> Any:
    try:
        return kind(plain)
    except TypeError:
        return plain


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) depth first, in the order of the containers."""
    below = children(tree)
    if below is None:
        yield path, tree
        return
    for name, child in below:
        yield from leaves(child, f"{path}.{name}" if path else name)


def map_tree(fn: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> Any:
    """The same tree with `fn` applied to every leaf, and to the containers that `is_leaf` accepts as leaves."""
    below = children(tree)
    if below is None or is_leaf(tree):
        return fn(tree)
    return rebuild(tree, [map_tree(fn, child, is_leaf) for _, child in below])


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """The same tree with `fn(path, leaf)` in place of every leaf."""
    values = [fn(path, leaf) for path, leaf in leaves(tree)][::-1]
    return map_tree(lambda _: values.pop(), tree)  # both traverse depth first
