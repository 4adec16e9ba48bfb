"""Tree leaves and model modules addressed by path: a tuple of attribute names, keys and indices."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

Path = tuple[str | int, ...]
_PLAIN_CONTAINER = "is in a plain list, tuple or dict: use nnx.List or nnx.Dict"


def path_key(key: Key[Array, ""], path: Path) -> Key[Array, ""]:
    """`key` folded with a path, so that a layer's random draws do not depend on which other layers exist."""
    return jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))


def is_variable(node: Any) -> bool:
    """Whether the node is an `nnx.Variable`, which this module treats as a single leaf.

    Not if it holds no array: where labels are mapped over the arrays of an `nnx.State`, optax puts a
    MaskedNode into the Variables of all other groups, and they are as absent as a MaskedNode on its own.
    """
    return isinstance(node, nnx.Variable) and bool(jax.tree.leaves(node))


def value_of(leaf: Any) -> Any:
    """The array of a leaf, which is a Variable or the array itself."""
    return leaf.get_value() if is_variable(leaf) else leaf


def with_value(leaf: Any, value: Any) -> Any:
    """The leaf with a new array, still wrapped if it is a Variable."""
    return leaf.replace(value) if is_variable(leaf) else value


def names(path: tuple[Any, ...]) -> Path:
    """A JAX key path as plain names and indices."""
    return tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in path)


def leaves(tree: Any, stop: Callable[[Any], bool] = lambda _: False) -> list[tuple[Path, Any]]:
    """(path, leaf) of a tree in flatten order; nodes for which `stop` is true are leaves too."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: is_variable(n) or stop(n))
    return [(names(path), leaf) for path, leaf in flat]


def map_leaves(f: Callable[[Path, Any], Any], tree: Any) -> Any:
    """The tree with each leaf replaced by f(path, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(names(path), leaf), tree, is_leaf=is_variable
    )


def modules(model: Any, kind: type | tuple[type, ...]) -> Iterator[tuple[Any, Any]]:
    """(path, module) of the modules of type `kind`; a shared module appears once."""
    return ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, kind))


def replace_modules(model: Any, by_id: dict[int, Any]) -> Any:
    """The model with every reference to a module whose id is in `by_id` replaced, in place.

    ValueError, before anything is replaced, if one is inside a plain container.
    """
    if id(model) in by_id:
        return by_id[id(model)]
    children = list(_children(model))
    targets = [(parent, name, child) for parent, name, child in children if id(child) in by_id]
    unreachable = by_id.keys() - {id(child) for _, _, child in targets}
    for path, node in nnx.iter_graph(model):
        if id(node) in unreachable:
            raise ValueError(f"{path_text(path)} {_PLAIN_CONTAINER}")
    for _, name, child in children:
        if isinstance(child, (list, tuple, dict)):
            items = jax.tree.leaves(child, is_leaf=lambda node: id(node) in by_id)
            if any(id(node) in by_id for node in items):
                raise ValueError(f"{name} {_PLAIN_CONTAINER}")
    for parent, name, child in targets:
        if isinstance(parent, nnx.List):
            parent[int(name)] = by_id[id(child)]
        else:
            setattr(parent, name, by_id[id(child)])
    return model


def reference_count(model: Any, node: Any) -> int:
    """How many attributes or items of the model's modules are `node`, a module or a Variable."""
    return sum(child is node for _, _, child in _children(model))


def path_text(path: Iterable[Any]) -> str:
    """The path as text, "blocks/attention/q"; the root is "the model"."""
    return "/".join(map(str, path)) or "the model"


def _children(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(parent, name, child) of every attribute or item of the model's modules."""
    for _, parent in modules(model, nnx.Pytree):
        yield from ((parent, name, child) for name, child in list(vars(parent).items()))
