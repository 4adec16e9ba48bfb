"""What optax keeps for a parameter: the fields of its states that mirror the parameters, found by paths.

A state whose class is not in the table may hold anything (parameters, accumulated gradients), so it is
refused by name where it holds something of a factor.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax

from relora_jax.core.paths import Path, leaves, said, value_of


class Statistics(NamedTuple):
    """Which fields of a state mirror the parameters (the first moment, if any, first), and its count."""

    fields: tuple[str, ...]
    first_moment: str = ""
    count: str = ""
    also: tuple[str, ...] = ()  # settings that the state carries

    @property
    def others(self) -> tuple[str, ...]:
        """The fields that are no statistics."""
        return (self.count, *self.also)


# by the name of the state's class
UNDERSTOOD = {
    "ScaleByAdamState": Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByAmsgradState": Statistics(("mu", "nu", "nu_max"), "mu", "count"),
    "ScaleByBeliefState": Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByLionState": Statistics(("mu",), "mu", "count"),
    "ScaleByRmsState": Statistics(("nu",)),
    "ScaleByRmsWithCountState": Statistics(("nu",), "", "count"),
    "ScaleByRStdDevState": Statistics(("mu", "nu"), "mu"),
    "ScaleByRStdDevWithCountState": Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByRssState": Statistics(("sum_of_squares",)),
    "ScaleByAdaDeltaState": Statistics(("e_g", "e_x")),
    "ScaleByNovogradState": Statistics(("mu", "nu"), "mu", "count"),
    "FactoredState": Statistics(("v_row", "v_col", "v"), "", "count"),
    "TraceState": Statistics(("trace",), "trace"),
    "EmaState": Statistics(("ema",), "ema", "count"),
    "MuonState": Statistics(("mu",), "mu", "count", ("ns_coeffs",)),
}


def known(node: Any) -> Statistics | None:
    """What the table says of a state; None where the node is no state, or one that it does not know."""
    kept = UNDERSTOOD.get(type(node).__name__) if _is_named(node) else None
    if kept is None or set(node._fields) != {*kept.fields, *kept.others} - {""}:
        return None  # another's class of the same name
    return kept


def states(tree: Any) -> list[Any]:
    """Every state of the tree that the table knows, in flatten order."""
    return [node for node in jax.tree.leaves(tree, is_leaf=_is_known) if _is_known(node)]


def statistics(state: Any, factors: Collection[Path]) -> Iterator[tuple[bool, Path, jax.Array]]:
    """(is it a first moment, factor's path, statistic) of each statistic of a factor in a known state."""
    kept = UNDERSTOOD[type(state).__name__]
    for name in kept.fields:
        for path, leaf in leaves(getattr(state, name)):
            if path in factors:
                yield name == kept.first_moment, path, value_of(leaf)


def refuse_unknown(tree: Any, *, factors: Collection[Path], params: Collection[Path]) -> None:
    """ValueError that names a state which holds something of a factor where no reset would find it."""
    for path, leaf in leaves(tree, stop=_is_known):
        kept = known(leaf)
        if kept is None:
            owner, inside = _owner(tree, path)
            refused = [owner] if any(_holds(inside, factor) for factor in factors if factor) else []
        else:  # statistics that do not lie as the parameters do would never be found
            fields = [(name, p) for name in kept.fields for p, _ in leaves(getattr(leaf, name))]
            refused = [_owner(tree, (*path, name))[0] for name, p in fields if p not in params]
        if factors and refused:
            raise ValueError(
                f"with_reset does not understand {refused[0]}, which holds something of a factor: "
                "put with_reset inside that transformation, or use another"
            )


def refuse_shared_count(tree: Any, *, factors: Collection[Path]) -> None:
    """ValueError where the factors have no count, or share theirs with other parameters."""
    counted = False
    for state in states(tree):
        kept = UNDERSTOOD[type(state).__name__]
        own = {path for _, path, _ in statistics(state, factors)}
        others = {path for name in kept.fields for path, _ in leaves(getattr(state, name))} - own
        counted |= bool(own and kept.count)
        if own and others and kept.count:
            raise ValueError(
                f"reset_count would also reset the count of {said(min(others, key=str))}: give the factors a "
                "group of their own with optax.partition(..., group_labels(params))"
            )
    if factors and not counted:
        raise ValueError("reset_count has nothing to reset: the optimizer keeps no count of the factors")


def _owner(node: Any, path: Path) -> tuple[str, Path]:
    """("Outer > Inner.field", rest of the path) of the named tuples on the way along `path`."""
    classes, field, inside = [], "?", path
    for depth, name in enumerate(path):
        if _is_named(node):
            classes.append(type(node).__name__)
            field, inside = name, path[depth + 1 :]
        try:
            named = _is_named(node) or hasattr(node, "__dataclass_fields__")
            node = getattr(node, str(name)) if named else node[name]
        except (AttributeError, LookupError, TypeError):
            break
    return f"{' > '.join(classes) or 'a state'}.{field}", inside


def _holds(path: Path, factor: Path) -> bool:
    """Whether the names of `factor` follow one another somewhere in `path`."""
    return any(path[i : i + len(factor)] == factor for i in range(len(path) - len(factor) + 1))


def _is_known(node: Any) -> bool:
    return known(node) is not None


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
