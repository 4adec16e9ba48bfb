"""Every linear layer of Flax is x @ W + bias: wrapped, merged and unwrapped, it equals NumPy in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from relora_jax.core.low_rank import LowRankDense, merge_and_reinit, unwrap, with_dropout_keys, wrap

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK


class Case(NamedTuple):
    """A layer, the shape of an input, and what the layer is as an einsum; delta sums over the rank, R."""

    make: Callable[..., Any]
    inputs: tuple[int, ...]
    equation: str  # input,kernel->output
    delta: str  # A,B->kernel
    bias: tuple[int, ...] = ()  # its shape beside the output; () for none


def linear(*args: Any, **options: Any) -> Callable[..., Any]:
    return lambda **more: nnx.Linear(*args, **options, **more)


def general(*args: Any, **options: Any) -> Callable[..., Any]:
    return lambda **more: nnx.LinearGeneral(*args, **options, **more)


def einsum(*args: Any, **options: Any) -> Callable[..., Any]:
    return lambda **more: nnx.Einsum(*args, **options, **more)


CASES = {
    "linear": Case(linear(4, 5), (2, 3, 4), "xya,ab->xyb", "aR,Rb->ab", (5,)),
    "linear without bias": Case(linear(4, 5, use_bias=False), (3, 4), "xa,ab->xb", "aR,Rb->ab"),
    "linear of one row": Case(linear(4, 5), (4,), "a,ab->b", "aR,Rb->ab", (5,)),
    "linear of no rows": Case(linear(4, 5), (0, 4), "xa,ab->xb", "aR,Rb->ab", (5,)),
    "to heads": Case(general(4, (2, 3)), (2, 5, 4), "xya,abc->xybc", "aR,Rbc->abc", (2, 3)),
    "from heads": Case(general((2, 3), 4, axis=(-2, -1)), (5, 7, 2, 3), "xyab,abc->xyc", "abR,Rc->abc", (4,)),
    "inner axes": Case(
        general((3, 2), (4, 5), axis=(1, -1)), (2, 3, 6, 2), "xayb,abcd->xycd", "abR,Rcd->abcd", (4, 5)
    ),
    "axes in another order": Case(  # Flax sorts the axes, but not in_features
        general((3, 2), (4,), axis=(-1, 1), use_bias=False), (5, 3, 2), "xab,abc->xc", "abR,Rc->abc"
    ),
    "first axis": Case(general(4, 5, axis=0), (4, 3, 2), "axy,ab->xyb", "aR,Rb->ab", (5,)),
    "einsum": Case(
        einsum("nta,hab->nthb", (4, 2, 3), (4, 3)), (5, 7, 2), "xya,bac->xybc", "aR,Rbc->bac", (4, 3)
    ),
    "einsum with dots": Case(
        einsum("...d,df->...f", (4, 5), (5,)), (2, 3, 4), "xya,ab->xyb", "aR,Rb->ab", (5,)
    ),
    "einsum with dots inside": Case(
        einsum("d...t, fd -> f...t", (5, 4), (5,)), (4, 2, 3), "axy,ba->bxy", "aR,Rb->ba", (5, 1, 1)
    ),
    "einsum over several axes": Case(
        einsum("bthd,hdf->btf", (2, 3, 4)), (5, 7, 2, 3), "xyab,abc->xyc", "abR,Rc->abc"
    ),
    "einsum that permutes": Case(
        einsum("ast,bacs->ctb", (2, 3, 4, 5), (4, 2)), (3, 5, 6), "axy,bacx->cyb", "axR,Rbc->bacx", (4, 1, 2)
    ),
}


FAST = {"linear", "linear of no rows", "from heads", "axes in another order", "einsum that permutes"}
NAMES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]


def drawn(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(len(shape) + sum(shape)).normal(size=shape))


def make(case: Case, *layers: int) -> Any:
    """The layer in float64, optionally stacked, with values drawn by NumPy."""
    layer = case.make(param_dtype=jnp.float64, kernel_metadata={"note": "mine"}, rngs=nnx.Rngs(0))
    for variable in (layer.kernel, layer.bias):
        if variable is not None:
            variable.set_value(drawn(*layers, *variable.shape))
    return layer


def lower(model: Any, **options: Any) -> Any:
    options = {"rank": RANK, "alpha": ALPHA, "base_dtype": "float64", "rngs": nnx.Rngs(1)} | options
    return wrap(model, **{"targets": lambda path, layer: True} | options)


def disturb(model: Any, size: float = 1.0) -> Any:
    for _, node in nnx.iter_graph(model):
        if isinstance(node, LowRankDense):
            node.lora_b.set_value((size * drawn(*node.lora_b.shape)).astype(node.lora_b.dtype))
    return model


def summed_kernel(case: Case, kernel: Any, a: Any, b: Any) -> np.ndarray:
    """The kernel + scale * A B, whose sides are unfolded into the kernel's axes; of one layer."""
    operands, axes = case.delta.split("->")
    sizes = dict(zip(axes, kernel.shape, strict=True)) | {"R": RANK}
    a, b = (
        np.asarray(factor).reshape([sizes[axis] for axis in side])
        for side, factor in zip(operands.split(","), (a, b), strict=True)
    )
    return np.asarray(kernel) + SCALE * np.einsum(case.delta, a, b)


def expected(case: Case, kernel: Any, bias: Any, x: Any) -> np.ndarray:
    y = np.einsum(case.equation, np.asarray(x), np.asarray(kernel))
    return y if bias is None else y + np.asarray(bias).reshape(case.bias)


@pytest.mark.parametrize("form", ("separate", pytest.param("fused", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", NAMES)
def test_wrapped_merged_and_unwrapped_layers_equal_numpy(name: str, form: str) -> None:
    case = CASES[name]
    with jax.enable_x64(True):
        layer, x = make(case), drawn(*case.inputs)
        kernel, bias = layer.kernel[...], layer.bias
        bias_value = None if bias is None else bias[...]
        np.testing.assert_allclose(layer(x), expected(case, kernel, bias_value, x), atol=1e-12)
        dense = lower(layer, product=form)
        np.testing.assert_allclose(dense(x), expected(case, kernel, bias_value, x), atol=1e-12)
        total = summed_kernel(case, kernel, *(v[...] for v in (disturb(dense).lora_a, dense.lora_b)))
        y = expected(case, total, bias_value, x)
        assert not y.size or np.abs(y - layer(x)).max() > 0.1
        np.testing.assert_allclose(dense(x), y, atol=1e-12)
        np.testing.assert_allclose(jax.jit(lambda dense, x: dense(x))(dense, x), y, atol=1e-12)
        merge_and_reinit(dense, key=jax.random.key(2))
        assert not np.any(dense.lora_b[...])
        np.testing.assert_allclose(dense(x), y, atol=1e-12)
        back = unwrap(disturb(dense))
        total = summed_kernel(case, total, dense.lora_a[...], dense.lora_b[...])
        np.testing.assert_allclose(back.kernel[...], total, atol=1e-12)
        np.testing.assert_allclose(back(x), expected(case, total, bias_value, x), atol=1e-12)
    assert type(back) is type(layer) and vars(back).keys() == vars(layer).keys()
    assert type(back.kernel) is nnx.Param and back.kernel.note == "mine" and back.bias is bias
    assert back.kernel.shape == kernel.shape and back.kernel.dtype == jnp.float64


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_equal_numpy_layer_by_layer(name: str) -> None:
    case, layers = CASES[name], 3
    with jax.enable_x64(True):
        layer, x = make(case, layers), drawn(layers, *case.inputs)
        kernels, bias = layer.kernel[...], layer.bias
        dense = disturb(lower(layer))
        a, b = dense.lora_a[...], dense.lora_b[...]
        assert a.shape[0] == b.shape[0] == dense.kernel.shape[0] == layers
        totals = [summed_kernel(case, kernels[i], a[i], b[i]) for i in range(layers)]
        ys = [expected(case, totals[i], None if bias is None else bias[i], x[i]) for i in range(layers)]

        def by_layer(stack: Any) -> Any:
            graph, state = nnx.split(stack)
            return jax.vmap(lambda state, x: nnx.merge(graph, state)(x))(state, x)

        np.testing.assert_allclose(by_layer(dense), np.stack(ys), atol=1e-12)
        merge_and_reinit(dense, key=jax.random.key(2))
        np.testing.assert_allclose(by_layer(dense), np.stack(ys), atol=1e-12)
        back = unwrap(dense)
        np.testing.assert_allclose(back.kernel[...], np.stack(totals), atol=1e-12)
        np.testing.assert_allclose(by_layer(back), np.stack(ys), atol=1e-12)
        with pytest.raises(ValueError, match=r"stacked, \(3,\): scan or map over its layers"):
            dense(x[0])


# --- the user's own code runs as before


@pytest.mark.parametrize("name", NAMES)
def test_wrapped_layer_has_the_attributes_of_the_plain_one(name: str) -> None:
    layer = CASES[name].make(rngs=nnx.Rngs(0))
    dense = lower(layer, base_dtype="float32")
    for attribute, value in vars(layer).items():
        if attribute not in ("kernel", "_pytree__state", "_pytree__nodes"):
            assert getattr(dense, attribute) is value, attribute
    back = unwrap(dense)
    assert nnx.graphdef(back) == nnx.graphdef(layer)


@pytest.mark.parametrize("name", ("linear", "to heads", "einsum"))
def test_wrapped_layer_is_called_like_the_plain_one(name: str) -> None:
    layer = CASES[name].make(rngs=nnx.Rngs(0))
    dense = lower(layer, base_dtype="float32")
    x = np.ones(CASES[name].inputs)
    calls: dict[str, Callable[[Any], Any]] = {
        "by keyword": lambda layer: layer(inputs=x, out_sharding=None),
        "by position": lambda layer: layer(x, None),
        "integers": lambda layer: layer(x.astype(int)),
        "half precision": lambda layer: layer(jnp.asarray(x, jnp.float16)),
        "bfloat16": lambda layer: layer(jnp.asarray(x, jnp.bfloat16)),
    }
    if name == "linear":
        calls["a list"] = lambda layer: layer(jnp.asarray(x).tolist()) if layer is dense else layer(x)
    if name == "einsum":
        calls["with its equation"] = lambda layer: layer(x, "nta, hab -> nthb")
        calls["three positions"] = lambda layer: layer(x, None, None)
    for call, of in calls.items():
        before, after = of(layer), of(dense)
        assert before.dtype == after.dtype, call
        np.testing.assert_allclose(after, before, atol=1e-6, err_msg=call)


@pytest.mark.parametrize("param_dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("dtype", (None, jnp.bfloat16, jnp.float32))
def test_dtype_of_the_output_is_that_of_the_plain_layer(dtype: Any, param_dtype: Any) -> None:
    layer = nnx.Linear(4, 5, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    cast = nnx.Linear(4, 5, dtype=dtype, rngs=nnx.Rngs(0))
    for variable in (cast.kernel, cast.bias):
        variable.set_value(variable.astype(param_dtype))  # param_dtype still says float32
    for each in (layer, cast):
        dense = lower(each, base_dtype="float32")
        for x in (jnp.ones((3, 4), jnp.bfloat16), jnp.ones((3, 4))):
            assert dense(x).dtype == each(x).dtype
        assert unwrap(dense).kernel.dtype == param_dtype


@pytest.mark.parametrize(
    "name",
    ("from heads", *(pytest.param(n, marks=pytest.mark.slow) for n in ("linear", "to heads", "einsum"))),
)
@pytest.mark.parametrize("form", ("separate", pytest.param("fused", marks=pytest.mark.slow)))
def test_out_sharding_is_that_of_the_plain_layer(name: str, form: str) -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    case = CASES[name]
    with jax.set_mesh(mesh):
        layer = case.make(rngs=nnx.Rngs(0))
        x = jnp.ones((4 * len(jax.devices()), *case.inputs[1:]))
        ndim = layer(x).ndim
        dense = disturb(lower(layer, base_dtype="float32", product=form))
        for spec in (PartitionSpec("rows", *(None,) * (ndim - 1)), PartitionSpec(*(None,) * ndim)):
            before, after = (each(x, out_sharding=spec) for each in (layer, dense))
            assert jax.typeof(before).sharding == jax.typeof(after).sharding
            np.testing.assert_allclose(after, unwrap(nnx.clone(dense))(x), atol=1e-5)


class Own(nnx.Linear):
    """A subclass with attributes and a method of its own, that computes what nnx.Linear does."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(4, 5, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(3))
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.parts = nnx.data([jnp.ones(2)])
        self.note = "mine"

    def norm_of_kernel(self) -> Any:
        return jnp.linalg.norm(self.kernel[...])


class Frozen(nnx.Param):
    pass


def test_unwrap_gives_a_subclass_back_with_its_attributes_and_type_of_kernel() -> None:
    layer = Own(rngs=nnx.Rngs(0))
    layer.kernel = Frozen(layer.kernel[...])
    model = nnx.Dict(own=layer)
    graph = nnx.graphdef(model)
    lower(model, base_dtype="float32")
    dense = model["own"]
    assert dense.note == "mine" and dense.gain is layer.gain and dense.norm is layer.norm
    unwrap(model)
    back = model["own"]
    assert type(back) is Own and type(back.kernel) is Frozen and nnx.graphdef(model) == graph
    assert back.gain is layer.gain and back.norm is layer.norm and back.parts[0] is layer.parts[0]
    np.testing.assert_allclose(back.norm_of_kernel(), layer.norm_of_kernel(), rtol=1e-6)
    back.added = nnx.Param(jnp.zeros(2))  # it is a module like any other
    assert "added" in nnx.state(back)


# --- attention


def attention(**options: Any) -> Any:
    options = {"num_heads": 4, "in_features": 8, "decode": False, "rngs": nnx.Rngs(0)} | options
    return nnx.MultiHeadAttention(**options)


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({}, id="plain"),
        pytest.param({"num_kv_heads": 2}, id="grouped", marks=pytest.mark.slow),
        pytest.param({"use_bias": False, "normalize_qk": True}, id="normalized"),
        pytest.param({"dtype": jnp.bfloat16}, id="bfloat16", marks=pytest.mark.slow),
    ),
)
def test_attention_of_flax_is_the_same_wrapped_merged_and_unwrapped(options: dict[str, Any]) -> None:
    model, x = attention(**options), jnp.asarray(drawn(2, 6, 8), jnp.float32)
    graph, before, calls = nnx.graphdef(model), model(x, is_causal=True), []
    lower(model, base_dtype="float32", targets=lambda path, layer: calls.append(path) or True)
    assert {*calls} == {("query",), ("key",), ("value",), ("out",)}
    tolerance = 2**-4 if "dtype" in options else 2e-5  # 8 steps of bfloat16 at 1
    assert model(x).dtype == before.dtype
    np.testing.assert_allclose(model(x, is_causal=True), before, atol=tolerance)
    moved = disturb(model, size=0.2)(x, is_causal=True)
    assert np.abs(moved - before).max() > 0.1
    merge_and_reinit(model, key=jax.random.key(1))
    np.testing.assert_allclose(model(x, is_causal=True), moved, atol=tolerance)
    unwrap(model)
    np.testing.assert_allclose(model(x, is_causal=True), moved, atol=tolerance)
    assert nnx.graphdef(model) == graph


@pytest.mark.slow
def test_decoding_with_a_cache_works_with_wrapped_projections() -> None:
    model, x = attention(decode=True), jnp.asarray(drawn(2, 3, 8), jnp.float32)
    disturb(lower(model, base_dtype="float32"))
    whole = model(x, is_causal=True, decode=False)
    model.init_cache((2, 3, 8))
    steps = [model(x[:, i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=1e-5)


def test_dropout_reaches_projections_only_through_keys() -> None:
    model, x = attention(), jnp.asarray(drawn(2, 6, 8), jnp.float32)
    disturb(lower(model, base_dtype="float32", dropout=0.5))
    without = model(x)
    np.testing.assert_array_equal(model(x), without)
    assert np.abs(model.query(x, key=jax.random.key(0)) - model.query(x)).max() > 0.1
    with_dropout_keys(model, key=jax.random.key(0))
    assert np.abs(model(x) - without).max() > 0.1


# --- what is refused


class Scaled(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return 2 * super().__call__(inputs, out_sharding)


class OtherBias(nnx.Einsum):
    def _infer_broadcasted_bias_shape(self, *args: Any) -> Any:
        return ()


class Tied(nnx.Linear):
    """Its kernel is computed."""

    @property
    def kernel(self) -> Any:
        return self.other

    @kernel.setter
    def kernel(self, value: Any) -> None:
        self.other = value


class Ranked(nnx.Linear):
    """Has an attribute that a low-rank layer uses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rank, self.scale = 3, 1.0


def stacked_on_the_second_axis() -> Any:
    layer = nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.ones((4, 7, 2, 3)))
    return layer


R = nnx.Rngs(0)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "own call": (lambda: Scaled(4, 5, rngs=R), "class Scaled has its own __call__"),
    "LoRALinear": (lambda: nnx.LoRALinear(4, 5, lora_rank=2, rngs=R), "LoRALinear has its own __call__"),
    "own bias": (lambda: OtherBias("ta,ab->tb", (4, 5), (5,), rngs=R), "own _infer_broadcasted_bias"),
    "own kernel": (lambda: Tied(4, 5, rngs=R), "class Tied has its own kernel or bias"),
    "our names": (lambda: Ranked(4, 5, rngs=R), r"Ranked has attributes .*: \['rank', 'scale'\]"),
    "batch axis": (
        lambda: nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=R),
        "a kernel for each index of its batch_axis",
    ),
    "dot_general": (lambda: nnx.LinearGeneral(4, 5, dot_general=jnp.dot, rngs=R), "a custom dot_general"),
    "dot_general_cls": (
        lambda: nnx.LinearGeneral(4, 5, dot_general_cls=dict, rngs=R),
        "a custom dot_general_cls",
    ),
    "einsum_op": (lambda: nnx.Einsum("ta,ab->tb", (4, 5), einsum_op=max, rngs=R), "custom einsum_op"),
    "batched einsum": (lambda: nnx.Einsum("ta,tab->tb", (3, 4, 5), rngs=R), "'ta,tab->tb' is not x @ W"),
    "summed input": (lambda: nnx.Einsum("tsa,ab->tb", (4, 5), rngs=R), "is not x @ W: each letter"),
    "summed kernel": (lambda: nnx.Einsum("ta,abc->tb", (4, 5, 6), rngs=R), "is not x @ W"),
    "diagonal": (lambda: nnx.Einsum("ta,aab->tb", (4, 4, 5), rngs=R), "is not x @ W"),
    "outer product": (lambda: nnx.Einsum("t,ab->tab", (4, 5), rngs=R), "is not x @ W"),
    "dots in the kernel": (lambda: nnx.Einsum("ta,...ab->...tb", (2, 4, 5), rngs=R), "is not x @ W"),
    "second axis": (stacked_on_the_second_axis, r"kernel \(4, 7, 2, 3\) is not \(4, 2, 3\), with leading"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_are_not_a_product_are_refused_with_the_reason(case: str) -> None:
    layer, message = REFUSED[case]
    model = nnx.Dict(good=nnx.Linear(4, 5, rngs=nnx.Rngs(0)), bad=layer())
    with pytest.raises(ValueError, match=f"exclude bad: .*{message}") as error:
        lower(model, base_dtype="float32")
    assert "\n" not in str(error.value) and type(model["good"]) is nnx.Linear


def test_every_refused_layer_is_listed_with_its_reason() -> None:
    shared = nnx.Linear(4, 5, rngs=R)
    tied = nnx.Linear(4, 5, rngs=R)
    tied.kernel = shared.kernel
    layers = {"a": Scaled(4, 5, rngs=R), "b": nnx.Linear(4, 5, rngs=R), "c": Scaled(4, 5, rngs=R)}
    model = nnx.Dict(**layers, d=nnx.Linear(4, 1, rngs=R), e=shared, f=tied, conv=nnx.Conv(2, 2, 3, rngs=R))
    with pytest.raises(ValueError) as error:
        lower(model, base_dtype="float32")
    text = str(error.value)
    assert "exclude a, c: class Scaled has its own __call__; d: rank 2 does not fit a 4 x 1 kernel" in text
    assert "e, f: its kernel is shared with another layer" in text and "b" not in text.split(": ")[1::2]
    assert all(type(model[name]) is type(layer) for name, layer in layers.items())
    lower(model, base_dtype="float32", targets=lambda path, layer: path == ("b",))
    assert isinstance(model["b"], LowRankDense)


def test_inputs_of_other_sizes_are_refused_even_if_they_have_as_many_entries() -> None:
    dense = lower(nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=R), base_dtype="float32")
    with pytest.raises(ValueError, match=r"the input has \(3, 2\) where the kernel has \(2, 3\)"):
        dense(jnp.ones((5, 3, 2)))
    other = lower(nnx.Einsum("ta,ab->tb", (4, 5), rngs=R), base_dtype="float32")
    with pytest.raises(ValueError, match="einsum_str 'ta,ab->bt' is not the layer's 'ta,ab->tb'"):
        other(jnp.ones((3, 4)), "ta,ab->bt")
