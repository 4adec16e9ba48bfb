"""What optax stores per parameter: the fields of its states that mirror the parameters, located by path.

A state whose class is not in KNOWN_STATES may store anything (parameters, accumulated gradients), so it is
rejected by name if it stores anything of a factor.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax

from relora_jax.core.paths import Path, leaves, path_text, value_of


class StateFields(NamedTuple):
    """Which fields of a state mirror the parameters (first moment first, if any), and which is its count."""

    statistics: tuple[str, ...]
    first_moment: str = ""
    count: str = ""
    settings: tuple[str, ...] = ()


# by the class name of the state
KNOWN_STATES = {
    "ScaleByAdamState": StateFields(("mu", "nu"), "mu", "count"),
    "ScaleByAmsgradState": StateFields(("mu", "nu", "nu_max"), "mu", "count"),
    "ScaleByBeliefState": StateFields(("mu", "nu"), "mu", "count"),
    "ScaleByLionState": StateFields(("mu",), "mu", "count"),
    "ScaleByRmsState": StateFields(("nu",)),
    "ScaleByRmsWithCountState": StateFields(("nu",), "", "count"),
    "ScaleByRStdDevState": StateFields(("mu", "nu"), "mu"),
    "ScaleByRStdDevWithCountState": StateFields(("mu", "nu"), "mu", "count"),
    "ScaleByRssState": StateFields(("sum_of_squares",)),
    "ScaleByAdaDeltaState": StateFields(("e_g", "e_x")),
    "ScaleByNovogradState": StateFields(("mu", "nu"), "mu", "count"),
    "FactoredState": StateFields(("v_row", "v_col", "v"), "", "count"),
    "TraceState": StateFields(("trace",), "trace"),
    "EmaState": StateFields(("ema",), "ema", "count"),
    "MuonState": StateFields(("mu",), "mu", "count", ("ns_coeffs",)),
}


def fields_of(node: Any) -> StateFields | None:
    """The entry of KNOWN_STATES for a state; None if the node is not a state, or an unknown one."""
    fields = KNOWN_STATES.get(type(node).__name__) if _is_named_tuple(node) else None
    if fields is None or set(node._fields) != {*fields.statistics, fields.count, *fields.settings} - {""}:
        return None  # the second case: an unrelated class of the same name
    return fields


def is_known(node: Any) -> bool:
    """Whether the node is a state that KNOWN_STATES describes."""
    return fields_of(node) is not None


def states(tree: Any) -> list[Any]:
    """Every known state of the tree, in flatten order."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_known) if is_known(node)]


def statistics(state: Any, factors: Collection[Path]) -> Iterator[tuple[bool, Path, jax.Array]]:
    """(is first moment, path of the factor, statistic) for each statistic of a factor in a known state."""
    fields = KNOWN_STATES[type(state).__name__]
    for name in fields.statistics:
        for path, leaf in leaves(getattr(state, name)):
            if path in factors:
                yield name == fields.first_moment, path, value_of(leaf)


def check_states(tree: Any, *, factors: Collection[Path], params: Collection[Path]) -> None:
    """Raises ValueError naming a state that stores something of a factor where a reset would not find it."""
    for path, leaf in leaves(tree, stop=is_known):
        fields = fields_of(leaf)
        if fields is None:
            owner = owner_of_factor(tree, path, factors)
            rejected = [owner] if owner else []
        else:  # statistics whose paths differ from those of the parameters would never be found
            entries = [(name, p) for name in fields.statistics for p, _ in leaves(getattr(leaf, name))]
            rejected = [_owner(tree, (*path, name))[0] for name, p in entries if p not in params]
        if factors and rejected:
            raise ValueError(
                f"with_reset does not support {rejected[0]}, which stores something of a factor: use another "
                "transformation (MultiSteps goes around with_reset)"
            )


def owner_of_factor(tree: Any, path: Path, factors: Collection[Path]) -> str:
    """'Outer > Inner.field', the state that holds the leaf at `path`, if it is of a factor; otherwise ''."""
    owner, inner_path = _owner(tree, path)
    return owner if any(_contains(inner_path, factor) for factor in factors if factor) else ""


def owner_outside(tree: Any, path: Path, node: Any, factors: Collection[Path]) -> str:
    """As `owner_of_factor`, for a leaf or a state that no `with_reset` contains."""
    owner, fields = _owner(tree, path)[0], fields_of(node)
    if "LookaheadState" in owner:  # a slow copy of each factor is among the parameters, and never merged
        return owner
    if fields is None:
        return owner_of_factor(tree, path, factors)
    for name in fields.statistics:
        # a statistic without a path is that of all parameters, flattened into one array
        if any(p in factors or not p for p, _ in leaves(getattr(node, name))):
            return _owner(tree, (*path, name))[0]
    return ""


def check_count(tree: Any, *, factors: Collection[Path]) -> None:
    """Raises ValueError if the factors have no count, or share it with other parameters."""
    has_count = False
    for state in states(tree):
        fields = KNOWN_STATES[type(state).__name__]
        own = {path for _, path, _ in statistics(state, factors)}
        others = {path for name in fields.statistics for path, _ in leaves(getattr(state, name))} - own
        has_count |= bool(own and fields.count)
        if own and others and fields.count:
            raise ValueError(
                f"reset_count would also reset the count of {path_text(min(others, key=str))}: put the "
                "factors in a separate group with optax.partition(..., group_labels(params))"
            )
    if factors and not has_count:
        raise ValueError("reset_count has nothing to reset: the optimizer keeps no count for the factors")


def _owner(node: Any, path: Path) -> tuple[str, Path]:
    """("Outer > Inner.field", rest of the path) for the named tuples along `path`."""
    classes, field, rest = [], "?", path
    for depth, name in enumerate(path):
        if _is_named_tuple(node):
            classes.append(type(node).__name__)
            field, rest = name, path[depth + 1 :]
        try:
            has_fields = _is_named_tuple(node) or hasattr(node, "__dataclass_fields__")
            node = getattr(node, str(name)) if has_fields else node[name]
        except (AttributeError, LookupError, TypeError):
            break
    return f"{' > '.join(classes) or 'a state'}.{field}", rest


def _contains(path: Path, factor: Path) -> bool:
    """Whether `factor` is a contiguous part of `path`."""
    return any(path[i : i + len(factor)] == factor for i in range(len(path) - len(factor) + 1))


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
