"""What a compiled program does, from the text of its optimized HLO: cost = sum over instructions x trips.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs it. Matrix
products are `dot`, `convolution` (as TPUs write them), cuBLAS calls, and those in cuDNN's and in splash
attention, as if they computed all pairs of positions; each multiply-add is two FLOPs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}  # other types end in their bits: f32, s8, u4, f8e4m3
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """name = shape opcode(operands), attributes; the shape and the attributes are text.

    The operand of a constant is its value, that of a parameter its index.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """Bytes that each device sends for all runs of one instruction, in rings within and between slices."""

    kind: str
    within_bytes: float
    between_bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a program does on each device."""

    matmul_flops: float
    recomputed_flops: float  # of these, in instructions that XLA added to save memory
    collectives: tuple[Collective, ...]

    def bytes_by_kind(self, *, between: bool) -> dict[str, float]:
        """{kind of collective: bytes that each device sends} within slices, or `between` them."""
        sums: dict[str, float] = {}
        for collective in self.collectives:
            count = collective.between_bytes if between else collective.within_bytes
            sums[collective.kind] = sums.get(collective.kind, 0) + count
        return {kind: count for kind, count in sums.items() if count}


def costs(text: str, *, slice_size: int) -> Costs:
    """The costs of a module's entry computation, on slices of `slice_size` devices each."""
    computations, entry = parse(text)
    matmul, recomputed, collectives, channels = 0.0, 0.0, [], set()
    for computation, trips in runs(computations, entry):
        instructions = computations[computation]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            flops = trips * matmul_flops(instruction, shapes)
            matmul += flops
            recomputed += flops if ".remat" in instruction.name or ".remat" in computation else 0
            kind = _kind(instruction, computation)
            channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
            identity = channel and (kind, channel[1])
            # On TPU one collective stands in several computations, those of what runs at the same time.
            if kind and (identity is None or identity not in channels):
                channels.add(identity)
                sent = _sent_bytes(kind, instruction, shapes, slice_size)
                collectives.append(Collective(kind, trips * sent[0], trips * sent[1]))
    return Costs(matmul, recomputed, tuple(collectives))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: its instructions}, the name of the entry computation)."""
    computations: dict[str, list[Instruction]] = {}
    entry, instructions = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            instructions = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            instructions.append(_instruction(match[1], line[match.end() :]))
    return computations, entry


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of each array in the text of a shape."""
    return [
        (kind, tuple(map(int, sizes.split(","))) if sizes else ()) for kind, sizes in _ARRAY.findall(shape)
    ]


def size_bytes(shape: str) -> float:
    """The bytes of all arrays in the text of a shape, without padding."""
    return sum(_element_bytes(kind) * math.prod(sizes) for kind, sizes in arrays(shape))


def matmul_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """2 x multiply-adds of one run of an instruction that is a matrix product, else 0."""
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode == "dot":
        return _dot_flops(instruction, shapes, _numbers(r"lhs_contracting_dims=\{([0-9,]*)\}", attributes))
    if opcode == "convolution":
        return _convolution_flops(instruction, shapes)
    if opcode == "custom-call" and 'custom_call_target="__cublas' in attributes:
        dims = _numbers(r'"lhs_contracting_dimensions":\[([0-9",]*)\]', attributes)
        return _dot_flops(instruction, shapes, dims)
    if match := re.search(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?"', attributes):
        (_, q), (_, k) = (arrays(shapes[name])[0] for name in instruction.operands[:2])  # [B, L, heads, h]
        # q k^T and weights v; backward the scores once more, and the gradients of q, k, v and the weights
        return (5 if match[1] else 2) * 2.0 * math.prod(q) * k[1]
    if match := re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name):
        operands = [arrays(shapes[name])[0][1] for name in instruction.operands]
        q, k = [sizes for sizes in operands if len(sizes) == 4][:2]  # [B, heads, L, h]
        # as above, but the scores and the weights' gradient are computed for q and for k and v
        return {"fwd": 2, "dq": 3, "dkv": 4}[match[1]] * 2.0 * math.prod(q) * k[2]
    return 0.0


def runs(
    computations: dict[str, list[Instruction]], entry: str, *, opcodes: Sequence[str] | None = None
) -> Iterator[tuple[str, int]]:
    """(computation, times that it runs) for the entry and everything that it calls, once per caller.

    With `opcodes`, only what instructions of these opcodes call.
    """
    pending = [(entry, 1)]
    while pending:
        name, trips = pending.pop()
        yield name, trips
        for instruction in computations[name]:
            is_loop = instruction.opcode == "while"
            times = trips * _trip_count(instruction, name, computations) if is_loop else trips
            if opcodes is None or instruction.opcode in opcodes:
                pending += [(computation, times) for computation in called(instruction)]


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction calls, except the condition of a loop."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += re.findall(r"%([\w.-]+)", branches)
    return names


def _trip_count(loop: Instruction, caller: str, computations: dict[str, list[Instruction]]) -> int:
    """The number of iterations: annotated (GPU, CPU) or from its condition (TPU); 1 if neither says."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    match = re.search(r"\bcondition=%([\w.-]+)", loop.attributes)
    condition = {i.name: i for i in computations.get(match[1] if match else "", [])}
    compared = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
    if len(compared) != 1:
        return 1
    counter, bound = (condition.get(operand) for operand in compared[0].operands)
    index = re.search(r"\bindex=(\d+)", counter.attributes) if counter else None
    if index is None or bound is None or bound.opcode != "constant":
        return 1
    instructions = {i.name: i for i in computations[caller]}
    state = instructions.get(loop.operands[0])
    start = state and instructions.get(state.operands[int(index[1])])
    while start and start.opcode.startswith("copy"):
        start = instructions.get(start.operands[0])
    # A loop that begins at 1, not 0: XLA has peeled its first iteration off.
    first = int(start.operands[0]) if start and start.opcode == "constant" else 0
    return math.ceil((int(bound.operands[0]) - first) / _step(loop, int(index[1]), computations))


def _step(loop: Instruction, index: int, computations: dict[str, list[Instruction]]) -> int:
    """What a loop's body adds to its counter, element `index` of its state; 2 if XLA has unrolled it once."""
    match = re.search(r"\bbody=%([\w.-]+)", loop.attributes)
    body = {i.name: i for i in computations.get(match[1] if match else "", [])}
    results = [i.operands[index] for i in body.values() if i.opcode == "tuple" and len(i.operands) > index]
    step, at = 0, body.get(results[-1]) if results else None
    while at and at.opcode == "add":
        left, right = (body.get(operand) for operand in at.operands)
        if right is None or right.opcode != "constant":
            break
        step, at = step + int(right.operands[0]), left
    return step or 1


def _instruction(name: str, text: str) -> Instruction:
    """The instruction whose text after `name = ` is given."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inner = rest[len(opcode) + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.-]+)", inner))
    operands = operands or ((inner,) if opcode in ("constant", "parameter") else ())
    return Instruction(name, shape, opcode, operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    return len(text)


def _element_bytes(kind: str) -> float:
    bits = re.match(r"[a-z]+(\d+)", kind)
    return BYTES[kind] if kind in BYTES else int(bits[1]) / 8 if bits else 0


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(number) for number in re.findall(r"\d+", match[1])] if match else []


def _dot_flops(instruction: Instruction, shapes: dict[str, str], contracting: list[int]) -> float:
    (_, out), (_, lhs) = arrays(instruction.shape)[0], arrays(shapes[instruction.operands[0]])[0]
    return 2.0 * math.prod(out) * math.prod(lhs[dim] for dim in contracting)


def _convolution_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """2 x outputs x input features x (kernel positions that meet an element, not padding or dilation)."""
    lhs, rhs = (arrays(shapes[operand])[0][1] for operand in instruction.operands[:2])
    out = arrays(instruction.shape)[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    macs = out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for dim in range(len(lhs_labels) - 2):
        label = str(dim)
        sizes = (lhs[lhs_labels.index(label)], out[out_labels.index(label)])
        macs *= _positions(*sizes, {name: value.split("x")[dim] for name, value in fields.items()})
    return 2.0 * macs


def _positions(lhs: int, out: int, window: dict[str, str]) -> int:
    """The pairs of an output and a kernel position, in one dimension, that meet an element of the input."""
    stride, lhs_dilate, rhs_dilate = (
        int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    pad_low = int(window.get("pad", "0_0").split("_")[0])
    outputs, kernel = np.arange(out)[:, None], np.arange(int(window.get("size", 1)))[None]
    at = outputs * stride + kernel * rhs_dilate - pad_low
    return int(np.sum((at >= 0) & (at <= (lhs - 1) * lhs_dilate) & (at % lhs_dilate == 0)))


def _kind(instruction: Instruction, computation: str) -> str:
    """The kind of collective that an instruction starts; empty if it starts none."""
    if instruction.opcode == "send" and (
        transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    ):
        return transfer[1].lower().replace("_", "-")  # between slices of TPUs
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # as TPUs write it: all-reduce and the slice that is kept
    return kind if kind in COLLECTIVES else ""


def _sent_bytes(
    kind: str, instruction: Instruction, shapes: dict[str, str], slice_size: int
) -> tuple[float, float]:
    """(within, between slices): what each device sends, first in its slice, then its share to the others."""
    if instruction.opcode == "send":
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', instruction.attributes)
        slices = len(target[1].split(",")) if target else 2
        return 0.0, _ring_bytes(kind, size_bytes(shapes[instruction.operands[0]]), slices)
    size = sum(size_bytes(shapes[operand]) for operand in instruction.operands)
    groups = replica_groups(instruction.attributes)
    if kind == "collective-permute":
        crossing = float(np.mean([len({device // slice_size for device in pair}) > 1 for pair in groups]))
        return size * (1 - crossing), size * crossing
    group = groups[0]
    slices = len({device // slice_size for device in group})
    members = len(group) // slices  # in each slice
    share = size / members if kind in ("all-reduce", "reduce-scatter") else size
    return _ring_bytes(kind, size, members), _ring_bytes(kind, share, slices)


def _ring_bytes(kind: str, size: float, members: int) -> float:
    """What a member of a ring sends, of `size` bytes that it holds at the start."""
    return size * {
        "all-gather": members - 1,
        "all-reduce": 2 * (members - 1) / members,
        "collective-permute": 1,
    }.get(kind, (members - 1) / members)


def replica_groups(attributes: str) -> list[list[int]]:
    """The groups of devices, or the pairs of a permutation, in any of the ways in which HLO writes them."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return [
            [int(number) for number in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", match[1])
        ]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, reshape, order = (_ints(part) for part in match.groups())
        ids = np.arange(math.prod(shape)).reshape(reshape)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        attributes,
    ):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        used = re.findall(r"'([^']+)'", match[4])
        names, sizes = list(axes), [int(size) for size in axes.values()]
        ids = np.arange(math.prod(sizes)).reshape(_ints(match[2]) or sizes)
        ids = (ids.transpose(_ints(match[3])) if match[3] else ids).reshape(sizes)
        order = [names.index(name) for name in names if name not in used]
        order += [names.index(name) for name in used]
        return ids.transpose(order).reshape(-1, math.prod(int(axes[name]) for name in used)).tolist()
    raise ValueError(f"cannot read the replica groups of {attributes[:200]!r}")


def _ints(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []
