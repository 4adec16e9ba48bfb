"""What a compiled program moves between devices, and the arrays that it has on one: from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2}  # other types end in their number of bits
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Shape = tuple[int, ...]


class Collective(NamedTuple):
    """One collective operation: how often it runs, the bytes of its result on a device, and its groups."""

    kind: str
    times: int
    bytes: int
    shapes: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh, in row-major order

    @property
    def total(self) -> int:
        """Bytes over all times that it runs."""
        return self.times * self.bytes

    def crosses(self, slices: int) -> bool:
        """Whether it connects the first, second, ... of `slices` equal parts of the mesh."""
        devices = max(max(group) for group in self.groups) + 1
        return any(len({device * slices // devices for device in group}) > 1 for group in self.groups)


def shapes(text: str) -> list[tuple[str, Shape]]:
    """(type, shape) of every array in HLO text."""
    arrays = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", text)
    return [(kind, tuple(map(int, sizes.split(","))) if sizes else ()) for kind, sizes in arrays]


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program; one in a loop runs as often as the loop's trip count says."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", list[str]()
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)

    def visit(name: str, times: int) -> Iterator[Collective]:
        for line in computations[name]:
            match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z-]+)\(", line)
            if match is None:
                continue
            kind = match[2].removesuffix("-start")
            if kind in KINDS:
                results = shapes(match[1])
                size = sum(_bytes(dtype) * math.prod(shape) for dtype, shape in results)
                yield Collective(kind, times, size, tuple(shape for _, shape in results), _groups(line))
            trips = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1]) if kind == "while" else 1
            for callee in re.findall(r"(?:body|calls|to_apply|\w+_computation)=%?([\w.-]+)", line):
                yield from visit(callee, times * trips)
            if branches := re.search(r"branch_computations=\{(.*?)\}", line):
                for callee in branches[1].split(","):
                    yield from visit(callee.strip(" %"), times)

    return list(visit(entry, 1))


def _bytes(dtype: str) -> int:
    return BYTES.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """The devices that a collective connects, as XLA writes them.

    {{0,2},{1,3}} lists them; [2,2]<=[2,2]T(1,0) is the transpose of the numbers 0 to 3 in the shape [2,2];
    mesh['axis_0'=2,'axis_1'=2], device_ids=([4]) {'axis_0'} has a group for each index of the other axes.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups = _devices(match[2], match[3]).reshape(_numbers(match[1]))
        return tuple(map(tuple, groups.tolist()))
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    match = re.search(rf"replica_groups=mesh\[([^\]]+)\]{ids} \{{([^}}]*)\}}", line)
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
    mesh = _devices(match[2] or ",".join(sizes), match[3]).reshape([int(size) for size in sizes])
    axes = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
    assert ":" not in match[4], f"a part of an axis: {line}"
    groups = np.moveaxis(mesh, axes, range(-len(axes), 0)).reshape(-1, math.prod(mesh.shape[a] for a in axes))
    return tuple(map(tuple, groups.tolist()))


def _devices(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
