"""Leaves of trees and modules of models by their paths: tuples of attribute names, keys and indices."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

Path = tuple[str | int, ...]
_HIDDEN = "lies in a plain container: hold it in nnx.List or nnx.Dict"


def path_key(key: Key[Array, ""], path: Path) -> Key[Array, ""]:
    """`key` folded with a path: a kernel's draws do not depend on which others are there."""
    return jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))


def is_variable(node: Any) -> bool:
    """Whether the node is an `nnx.Variable`, which counts as one leaf here."""
    return isinstance(node, nnx.Variable)


def value_of(leaf: Any) -> Any:
    """The array of a leaf, in a Variable or bare."""
    return leaf.get_value() if is_variable(leaf) else leaf


def with_value(leaf: Any, value: Any) -> Any:
    """The leaf with another array, in a Variable if it was."""
    return leaf.replace(value) if is_variable(leaf) else value


def names(path: tuple[Any, ...]) -> Path:
    """Jax's keys as plain names and indices."""
    return tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in path)


def leaves(tree: Any, stop: Callable[[Any], bool] = lambda _: False) -> list[tuple[Path, Any]]:
    """(path, leaf) of a tree in flatten order; nodes for which `stop` holds are leaves too."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: is_variable(n) or stop(n))
    return [(names(path), leaf) for path, leaf in found]


def map_leaves(f: Callable[[Path, Any], Any], tree: Any) -> Any:
    """The tree with f(path, leaf) in the place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(names(path), leaf), tree, is_leaf=is_variable
    )


def modules(model: Any, kind: type) -> Iterator[tuple[Any, Any]]:
    """(path, module) of the modules of that kind; one that is held twice comes once."""
    return ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, kind))


def replace_modules(model: Any, by_id: dict[int, Any]) -> Any:
    """The model with each module whose id is a key replaced at every place that holds it.

    ValueError, and nothing replaced, where one lies in a plain container that cannot be seen into.
    """
    if id(model) in by_id:
        return by_id[id(model)]
    held = list(_held(model))
    places = [(parent, name, child) for parent, name, child in held if id(child) in by_id]
    missed = by_id.keys() - {id(child) for _, _, child in places}
    for path, node in nnx.iter_graph(model):
        if id(node) in missed:
            raise ValueError(f"{said(path)} {_HIDDEN}")
    for _, name, child in held:
        if isinstance(child, (list, tuple, dict)):
            inside = jax.tree.leaves(child, is_leaf=lambda node: id(node) in by_id)
            if any(id(node) in by_id for node in inside):
                raise ValueError(f"{name} {_HIDDEN}")
    for parent, name, child in places:
        if isinstance(parent, nnx.List):
            parent[int(name)] = by_id[id(child)]
        else:
            setattr(parent, name, by_id[id(child)])
    return model


def holders(model: Any, node: Any) -> int:
    """At how many places the model holds the node, a module or a Variable."""
    return sum(child is node for _, _, child in _held(model))


def said(path: Iterable[Any]) -> str:
    """The path as text, "blocks/attention/q"; the root is "the model"."""
    return "/".join(map(str, path)) or "the model"


def _held(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(parent, name, child) of all that the model's modules hold as attributes or items."""
    for _, parent in modules(model, nnx.Pytree):
        yield from ((parent, name, child) for name, child in list(vars(parent).items()))
