"""INT8 products on the CPU against exact integers, from the sessions that the runtime opens."""

from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad_runtime import onnx_graph
from m3ad_runtime.onnx_graph import AS_WRITTEN, INTEGER_PRODUCT, OnnxGraph, sums_saturate
from onnx import TensorProto, helper, numpy_helper

Values = Literal["large", "any"]
Form = Literal["MatMul", "Gemm", "Gemm transposed"]
STEP, WEIGHT_STEP = np.float32(0.5), np.float32(0.25)


@pytest.fixture(params=["as this CPU needs", "as a CPU whose sums saturate needs"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second form runs the other kernels, on CPUs that do without them too."""
    if request.param != "as this CPU needs":
        monkeypatch.setattr(onnx_graph, "sums_saturate", lambda: True)


def integers(rng: np.random.Generator, shape: tuple[int, int], values: Values, low: int) -> np.ndarray:
    """Eight-bit integers from `low`: any, or those near both ends, alike in a column: neighbours sum up."""
    if values == "any":
        return rng.integers(low, low + 256, shape)
    top, bottom = rng.integers(low + 228, low + 256, shape), rng.integers(low, low + 28, shape)
    return np.where(rng.random((1, shape[1])) < 0.5, top, bottom)


def product(
    form: Form, weights: list[np.ndarray], reads: list[int], is_signed: bool, per_channel: bool
) -> onnx.ModelProto:
    """y_i = x_i w_reads[i] with Q/DQ pairs around x_i and DQ behind each weight, which several may read."""
    zero = np.int8(0) if is_signed else np.uint8(128)
    columns = weights[0].shape[1]
    count = columns if per_channel else None
    scales = WEIGHT_STEP * (1 + np.arange(columns, dtype=np.float32) % 3) if per_channel else WEIGHT_STEP
    zeros = np.zeros(count, np.int8) if count else np.int8(0)
    constants = {"step": STEP, "zero": zero}
    nodes = []
    for k, weight in enumerate(weights):
        is_turned = form == "Gemm transposed"
        constants |= {
            f"w{k}": (weight.T if is_turned else weight).astype(np.int8),
            f"s{k}": scales,
            f"z{k}": zeros,
        }
        axis = {"axis": 0 if is_turned else 1} if per_channel else {}
        nodes.append(helper.make_node("DequantizeLinear", [f"w{k}", f"s{k}", f"z{k}"], [f"d{k}"], **axis))
    for i, k in enumerate(reads):
        turned = {"transB": 1} if form == "Gemm transposed" else {}
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{i}", "step", "zero"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", "step", "zero"], [f"a{i}"]),
            helper.make_node(form.split()[0], [f"a{i}", f"d{k}"], [f"y{i}"], **turned),
        ]
    return model_of(
        nodes, [f"x{i}" for i in range(len(reads))], [f"y{i}" for i in range(len(reads))], constants
    )


def model_of(
    nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    infos = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["R", None]) for n in names]
        for names in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", *infos, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def is_as_written(graph: OnnxGraph) -> bool:
    """Whether it fell back to the form without integer kernels."""
    (key,) = AS_WRITTEN
    try:
        return graph.session.get_session_options().get_session_config_entry(key) == "1"
    except RuntimeError:  # the entry was never set
        return False


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "shape", [(9, 66, 33), (1, 127, 16), (64, 256, 96), (300, 3, 5), (7, 1088, 40)], ids=str
)
@pytest.mark.parametrize("values", ["large", "any"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm transposed"])
def test_products_are_those_of_integers(
    kind: Form, is_signed: bool, per_channel: bool, values: Values, shape: tuple[int, int, int]
) -> None:
    check(kind, is_signed, per_channel, values, shape, [0])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_products_that_share_their_weights_are_exact_too(kind: Form, per_channel: bool) -> None:
    check(kind, True, per_channel, "large", (20, 70, 24), [0, 1, 0])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 70)),
    is_signed=st.booleans(),
    per_channel=st.booleans(),
)
def test_products_of_any_shape_are_exact(
    shape: tuple[int, int, int], is_signed: bool, per_channel: bool
) -> None:
    check("MatMul", is_signed, per_channel, "large", shape, [0])


def check(
    kind: Form,
    is_signed: bool,
    per_channel: bool,
    values: Values,
    shape: tuple[int, int, int],
    reads: list[int],
) -> None:
    rows, depth, columns = shape
    rng = np.random.default_rng(rows + depth + columns)
    weights = [integers(rng, (columns, depth), values, -128).T for _ in range(max(reads) + 1)]
    steps = [integers(rng, (rows, depth), values, -128 if is_signed else 0) for _ in reads]
    model = product(kind, weights, reads, is_signed, per_channel)
    scales = WEIGHT_STEP * (1 + np.arange(columns) % 3 if per_channel else 1)
    offset = 0 if is_signed else 128
    feed = {f"x{i}": ((x - offset) * STEP).astype(np.float32) for i, x in enumerate(steps)}
    found = OnnxGraph(model.SerializeToString(), 2)(feed)
    for i, (x, k) in enumerate(zip(steps, reads, strict=True)):
        wanted = (x - offset) @ weights[k] * (STEP * scales).astype(np.float64)
        assert np.abs(found[f"y{i}"] - wanted).max() <= 1e-5 * np.abs(wanted).max(), (i, kind)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("depth", [66, 256, 384])
def test_a_product_with_weights_alone_in_int8_takes_the_activation_as_it_is(
    depth: int, per_channel: bool
) -> None:
    """ONNX Runtime's kernel for it would round the activation to INT8 in blocks: 0.006 of the largest value."""
    rng = np.random.default_rng(depth)
    weight = integers(rng, (32, depth), "any", -128).T
    scales = (1 + rng.random(32) if per_channel else np.float64(1.5)).astype(np.float32)
    zeros = np.zeros(scales.shape, np.int8)
    axis = {"axis": 1} if per_channel else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], **axis),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    model = model_of(nodes, ["x"], ["y"], {"w": weight.astype(np.int8), "s": scales, "z": zeros})
    x = rng.normal(size=(20, depth)).astype(np.float32)
    wanted = x.astype(np.float64) @ (weight * scales.astype(np.float64))
    found = OnnxGraph(model.SerializeToString(), 2)({"x": x})["y"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_weights_of_their_own_are_not_run_as_written_and_shared_ones_at_worst() -> None:
    rng = np.random.default_rng(0)
    weights = [integers(rng, (24, 70), "large", -128).T for _ in range(2)]
    own, shared = (
        OnnxGraph(product("MatMul", weights, reads, True, True).SerializeToString(), 2)
        for reads in ([0, 1], [0, 0])
    )
    assert not is_as_written(own)
    assert is_as_written(shared) <= sums_saturate()


def test_the_probe_is_an_integer_product_and_speaks_for_the_kernels() -> None:
    values = [("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("y", TensorProto.INT32)]
    infos = [helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in values]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", infos[:2], infos[2:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=7)
    assert onnx.load_from_string(INTEGER_PRODUCT) == model
    # The fused kernel without any option: it is exact where the probe says so.
    weight = np.full((64, 32), 127)
    plain = ort.InferenceSession(product("MatMul", [weight], [0], True, True).SerializeToString())
    (found,) = plain.run(None, {"x0": np.full((5, 64), 127 * STEP, np.float32)})
    wanted = 64 * 127 * 127 * STEP * WEIGHT_STEP * (1 + np.arange(32) % 3)
    assert np.allclose(found, wanted, rtol=1e-5) != sums_saturate()
