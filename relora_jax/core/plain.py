"""x @ W (+ bias) of Flax's linear layers: `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and subclasses.

Each sums over some axes that its input and its kernel share. With those moved to the end of the input and
to the front of the kernel, and flattened, it is the product of rows x [*tokens, in] with a matrix W
[*layers, in, out]. Axes are written as the letters of an einsum, such as "...a,abc->...bc".
"""

import dataclasses
import inspect
import math
import string
import types
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
NAMES = "nnx.Linear, nnx.LinearGeneral or nnx.Einsum"
# arguments of the three constructors that replace a part of the computation
_REPLACEMENTS = ("dot_general", "dot_general_cls", "einsum_op", "promote_dtype", "preferred_element_type")


@dataclasses.dataclass(frozen=True)
class Plain:
    """A layer without its arrays: how its axes form x @ W, and what its kernel was."""

    kind: type[nnx.Module]
    kernel_kind: type[nnx.Variable]
    kernel_metadata: tuple[tuple[str, Any], ...]
    kernel_dtype: Any
    kernel_axes: str
    kernel_sizes: tuple[int, ...]  # without the leading axes of a stacked model
    summed: str  # those of kernel_axes that the input has too
    axis: tuple[int, ...]  # which axes of the input these are; empty if `equation` says it
    equation: str = ""  # "input->output"

    @property
    def is_matrix(self) -> bool:
        """Whether the kernel has the shape of W."""
        return self.kernel_axes == self.summed + self._kept and len(self.kernel_axes) == 2

    def matrix(self, kernel: Float[Array, "*kernel"]) -> Float[Array, "*layers in out"]:
        """W, with the values of the layer's kernel."""
        layers = kernel.shape[: kernel.ndim - len(self.kernel_axes)]
        kernel = _permute(kernel, f"...{self.kernel_axes}", f"...{self.summed}{self._kept}")
        return kernel.reshape(
            *layers, math.prod(self._sizes(self.summed)), math.prod(self._sizes(self._kept))
        )

    def kernel(self, matrix: Float[Array, "*layers in out"]) -> Float[Array, "*kernel"]:
        """The inverse of `matrix`."""
        axes = self.summed + self._kept
        matrix = matrix.reshape(*matrix.shape[:-2], *self._sizes(axes))
        return _permute(matrix, f"...{axes}", f"...{self.kernel_axes}")

    def rows(self, inputs: Float[Array, "*inputs"]) -> Float[Array, "*tokens in"]:
        """x, with the values of the layer's input."""
        before, _ = self._sides(inputs.ndim)
        inputs = _permute(inputs, before, _without(before, self.summed) + self.summed)
        tokens, sizes = inputs.shape[: -len(self.summed)], inputs.shape[-len(self.summed) :]
        if sizes != self._sizes(self.summed):
            raise ValueError(f"the input has {sizes} where the kernel has {self._sizes(self.summed)}")
        return inputs.reshape(*tokens, math.prod(sizes))

    def outputs(self, y: Float[Array, "*tokens out"], bias: Any, *, ndim: int) -> Float[Array, "*outputs"]:
        """The layer's output for x @ W, if its input has `ndim` axes: in its shape, plus bias."""
        before, after = self._sides(ndim)
        y = y.reshape(*y.shape[:-1], *self._sizes(self._kept))
        y = _permute(y, _without(before, self.summed) + self._kept, after)
        if bias is None:
            return y
        axes = after.replace("...", "." * (y.ndim - len(after.replace("...", ""))))
        sizes = dict(zip(self.kernel_axes, self.kernel_sizes, strict=True))
        return y + bias.reshape([sizes.get(axis, 1) for axis in axes])

    @property
    def _kept(self) -> str:
        return _without(self.kernel_axes, self.summed)

    def _sizes(self, axes: str) -> tuple[int, ...]:
        return tuple(self.kernel_sizes[self.kernel_axes.index(axis)] for axis in axes)

    def _sides(self, ndim: int) -> tuple[str, str]:
        """The axes of an input with `ndim` of them, and those of its output."""
        if self.equation:
            before, after = self.equation.split("->")
            return before, after
        axes = list(string.ascii_uppercase[:ndim])
        for axis, letter in zip(sorted(axis % ndim for axis in self.axis), self.summed, strict=True):
            axes[axis] = letter
        return "".join(axes), _without("".join(axes), self.summed) + self._kept


def plain(layer: Any) -> Plain:
    """The `Plain` of a layer. ValueError if the layer computes anything but x @ W + bias."""
    _check_computation(layer)
    if isinstance(layer, nnx.Einsum):
        shape, axis = tuple(layer.kernel_shape), ()
        axes, summed, equation = _einsum_axes(layer.einsum_str)
    else:
        fan_in, shape = _tuple(layer.in_features), (*_tuple(layer.in_features), *_tuple(layer.out_features))
        axis, equation = getattr(layer, "axis", (-1,)), ""
        axes = string.ascii_lowercase[: len(shape)]
        summed = axes[: len(fan_in)]
    kernel = layer.kernel
    sizes = kernel.shape[-len(axes) :]
    if kernel.ndim < len(axes) or (kernel.ndim > len(axes) and sizes != shape):
        raise ValueError(f"its kernel {kernel.shape} is not {shape}, with leading axes if it is stacked")
    metadata = tuple(kernel.get_metadata().items())
    return Plain(type(layer), type(kernel), metadata, kernel.dtype, axes, sizes, summed, axis, equation)


def copy_attributes(source: nnx.Module, target: nnx.Module) -> None:
    """Gives `target`, an empty module, the attributes of `source`; Variables are shared, not copied."""
    own = {name: value for name, value in target.__getstate__().items() if name == "_pytree__state"}
    target.__setstate__(source.__getstate__() | own)  # unlike setattr, keeps what is data and what is static


def empty(kind: type[nnx.Module]) -> Any:
    """A module of this class without attributes: its constructor is not called."""
    module = object.__new__(kind)
    module.__setstate__(nnx.Module().__getstate__())
    return module


def _check_computation(layer: Any) -> None:
    """Raises ValueError if the layer's class or arguments change what the class of Flax computes."""
    kind: Any = next((kind for kind in KINDS if issubclass(type(layer), kind)), None)
    if kind is None:
        raise ValueError(f"it is an {type(layer).__name__}, not an {NAMES}")
    functions = [name for name, value in vars(kind).items() if isinstance(value, types.FunctionType)]
    functions = [n for n in functions if n != "__init__" and getattr(type(layer), n) is not getattr(kind, n)]
    if functions or not {"kernel", "bias"} <= vars(layer).keys():
        changed = f"own {', '.join(functions)}" if functions else "own kernel or bias"
        raise ValueError(f"class {type(layer).__name__} has its {changed}")
    defaults = inspect.signature(kind.__init__).parameters
    custom = [
        name
        for name in _REPLACEMENTS
        if name in defaults and getattr(layer, name, defaults[name].default) is not defaults[name].default
    ]
    if custom:
        raise ValueError(f"it has a custom {', '.join(custom)}")
    if getattr(layer, "batch_axis", None):
        raise ValueError("it has a kernel for each index of its batch_axis")


def _einsum_axes(equation: str) -> tuple[str, str, str]:
    """(axes of the kernel, those that are summed, "input->output"). ValueError if it is no x @ W."""
    operands, after = equation.replace(" ", "").split("->")
    before, kernel = operands.split(",")
    sides = [side.replace("...", "") for side in (before, kernel, after)]
    unique = all(len(set(side)) == len(side) for side in sides)
    if not unique or "." in kernel or {*before} ^ {*kernel} != {*after} or not {*before} & {*kernel}:
        raise ValueError(
            f"its einsum_str {equation!r} is not x @ W: each letter must be in two of input, kernel and "
            "output, and at least one not in the output"
        )
    return kernel, "".join(axis for axis in kernel if axis in before), f"{before}->{after}"


def _tuple(sizes: Any) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _permute(x: Any, axes: str, new_axes: str) -> Any:
    return x if axes == new_axes else jnp.einsum(f"{axes}->{new_axes}", x)


def _without(axes: str, others: str) -> str:
    return "".join(axis for axis in axes if axis not in others)
