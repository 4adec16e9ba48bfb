"""A compiled program's kernels: its least time is their sum of max(FLOPs / peak, bytes / bandwidth).

A kernel is an instruction that XLA does not fuse into another. It reads its operands and writes its result
once, in the device's memory: of an array of which only a slice is read, gathered or updated in place, that
slice alone. FLOPs are those of matrix products (hlo.py); what is sent between devices is not counted.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from relora_jax.planning import hlo
from relora_jax.planning.chips import Chip
from relora_jax.planning.hlo import Instruction

SEQUENCES = ("while", "call", "conditional", "async-start")  # what they call are kernels, not parts of one
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "send", "recv"),
)
# A slice of their result is one of their operand.
UNARY = ("bitcast", "convert", "copy", "reshape", "transpose")
PARTS = ("dynamic-slice", "slice", "gather")


class Kernel(NamedTuple):
    """What all runs of one instruction do: FLOPs of matrix products, bytes read and written.

    `types`: those of the products' operands, as HLO writes them. `source`: what its last instruction comes
    from, as JAX names it, with the scopes of `jax.named_scope`.
    """

    name: str
    flops: float
    bytes: float
    types: frozenset[str] = frozenset()
    source: str = ""

    def seconds(self, chip: Chip) -> float:
        """The least time, if nothing else runs beside it."""
        in_eight_bits = self.types and self.types <= {*chip.eight_bit_types}
        peak = chip.matmul_flops_per_s * (2 if in_eight_bits else 1)
        return max(self.flops / peak, self.bytes / chip.memory_bytes_per_s)


def roofline_s(kernels: Sequence[Kernel], chip: Chip) -> float:
    """The least seconds of kernels that run one after the other."""
    return sum(kernel.seconds(chip) for kernel in kernels)


def kernels(text: str) -> tuple[Kernel, ...]:
    """The kernels of a module's entry computation and of its loops and calls, in no particular order."""
    computations, entry = hlo.parse(text)
    result = []
    for computation, trips in hlo.runs(computations, entry, opcodes=SEQUENCES):
        instructions = computations[computation]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if _is_kernel(instruction):
                flops, types = _products(instruction, shapes, computations)
                size = _read_bytes(instruction, shapes, computations)
                size += _written_bytes(instruction, shapes, computations)
                source = re.search(r'op_name="([^"]*)"', instruction.attributes)
                scopes = source[1] if source else ""
                result.append(Kernel(instruction.name, trips * flops, trips * size, types, scopes))
    return tuple(result)


def _is_kernel(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode in (*SEQUENCES, *FREE) or opcode.endswith(("-done", "-update")):
        return False
    return opcode.removesuffix("-start") not in hlo.COLLECTIVES


def _products(
    instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]
) -> tuple[float, frozenset[str]]:
    """(FLOPs, types) of the products in the instruction and in all that is fused into it."""
    fused = [(1, instruction, shapes)]
    for called in hlo.called(instruction):
        for name, trips in hlo.runs(computations, called):
            inner = {other.name: other.shape for other in computations[name]}
            fused += [(trips, other, inner) for other in computations[name]]
    total, types = 0.0, set[str]()
    for trips, other, known in fused:
        if flops := hlo.matmul_flops(other, known):
            total += trips * flops
            types |= {hlo.arrays(known[operand])[0][0] for operand in other.operands[:2] if operand in known}
    return total, frozenset(types)


def _read_bytes(
    instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]
) -> float:
    return sum(
        _share(instruction, operand, shapes, computations) * _bytes(shapes[operand])
        for operand in dict.fromkeys(instruction.operands)
        if operand in shapes
    )


def _share(
    user: Instruction, operand: str, shapes: dict[str, str], computations: dict[str, list[Instruction]]
) -> float:
    """The share of an operand that an instruction reads."""
    places = [index for index, name in enumerate(user.operands) if name == operand]
    size = _elements(shapes[operand])
    if user.opcode == "fusion" and size:
        body = computations[hlo.called(user)[0]]
        parameters = [i for i in body if i.opcode == "parameter" and int(i.operands[0]) in places]
        return min(sum(_share_within(body, parameter, computations) for parameter in parameters), 1.0)
    if user.opcode in PARTS and places == [0] and size:
        return min(_elements(user.shape) / size, 1.0)
    if user.opcode == "dynamic-update-slice" and places == [0]:
        return 0.0  # in place
    if user.opcode == "scatter" and places == [0] and size:
        return min(_elements(shapes[user.operands[-1]]) / size, 1.0)  # in place, but added to
    return 1.0


def _share_within(
    body: list[Instruction], value: Instruction, computations: dict[str, list[Instruction]]
) -> float:
    """The share of a value that the rest of a fusion reads; as a result it is written, not read."""
    shapes, total = {instruction.name: instruction.shape for instruction in body}, 0.0
    for user in (instruction for instruction in body if value.name in instruction.operands):
        if user.opcode in UNARY and user is not body[-1]:
            total += _share_within(body, user, computations)
        else:
            total += _share(user, value.name, shapes, computations)
    return min(total, 1.0)


def _written_bytes(
    instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]
) -> float:
    opcode = instruction.opcode
    if opcode == "fusion":
        body = computations[hlo.called(instruction)[0]]
        inner = {other.name: other for other in body}
        inner_shapes = {other.name: other.shape for other in body}
        return sum(_written_bytes(root, inner_shapes, computations) for root in _results(body[-1], inner))
    if opcode == "dynamic-update-slice":
        return _bytes(shapes[instruction.operands[1]])
    if opcode == "scatter":
        return _bytes(shapes[instruction.operands[-1]])
    if opcode == "copy-start":
        return _bytes(_first_array(instruction.shape))  # the others are its source and a token
    if opcode == "custom-call" and 'custom_call_target="__cu' in instruction.attributes:
        return _bytes(re.sub(r"\b[su]8\[\d+\]", "", instruction.shape))  # without the library's workspace
    return _bytes(instruction.shape)


def _results(root: Instruction, instructions: dict[str, Instruction]) -> Iterator[Instruction]:
    """The instructions of a fusion whose results leave it; a shape that is cast hides none in place."""
    if root.opcode == "tuple":
        for operand in root.operands:
            yield from _results(instructions[operand], instructions)
        return
    source = root
    while source.opcode == "bitcast":
        source = instructions[source.operands[0]]
    yield source if source.opcode in ("dynamic-update-slice", "scatter", "fusion") else root


def _first_array(shape: str) -> str:
    match = re.search(r"\b[a-z][a-z0-9]*\[[0-9,]*\](\{[^}]*\})?", shape)
    return match[0] if match else ""


def _bytes(shape: str) -> float:
    """The bytes of the arrays in the text of a shape that are in the device's main memory, `S(0)` or none."""
    return hlo.size_bytes(re.sub(r"\b[a-z][a-z0-9]*\[[0-9,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}", "", shape))


def _elements(shape: str) -> float:
    return float(sum(math.prod(sizes) for _, sizes in hlo.arrays(shape)))
