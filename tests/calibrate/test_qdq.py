import re
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import M3adError, MissingDependencyError
from m3ad_calibrate import qdq
from m3ad_calibrate.modelopt import Engine, quantized_by_modelopt
from m3ad_calibrate.quantize import Graph, Settings
from m3ad_export.graphs.plan import Keep, Plan, PlanPrecision, default_plan
from m3ad_export.graphs.precision import histogram
from onnx import TensorProto, helper, numpy_helper

INT8 = Plan("int8", "fp32", ())


def toy(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """y = x W^T + b as a Gemm, then a LayerNorm and a MatMul."""
    width = weight.shape[0]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="fc/linear/Gemm", transB=1),
            helper.make_node("LayerNormalization", ["h", "g", "o"], ["n"], name="norm/LayerNormalization"),
            helper.make_node("MatMul", ["n", "v"], ["y"], name="out/linear/MatMul"),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", width])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(bias, "b"),
            numpy_helper.from_array(np.linspace(0.1, 20, width).astype(np.float32), "g"),
            numpy_helper.from_array(np.zeros(width, np.float32), "o"),
            numpy_helper.from_array(np.eye(width, dtype=np.float32)[::-1].copy(), "v"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return toy(rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=16).astype(np.float32))


def values(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def test_int8_is_what_the_formula_says(model: onnx.ModelProto) -> None:
    """First layer in NumPy: x and W rounded to their scales, the product and the bias in floating point."""
    plan = Plan("int8", "fp32", (Keep("out", "the norm's product stays", "rest"),))
    prepared = qdq.prepared(model, "toy", plan)
    assert qdq.activations(prepared, "toy", plan) == {"x"}
    found = qdq.quantized(prepared, "toy", plan, {"x": 3.0})
    onnx.checker.check_model(found, full_check=True)
    x = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    x[0, 0] = 9  # beyond the limit: clipped
    weight, bias = values(model, "w"), values(model, "b")
    w_scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    w = np.round(weight / w_scale) * w_scale
    xq = np.clip(np.round(x / (3 / 127)), -127, 127) * (3 / 127)
    h = xq @ w.T + bias
    n = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * values(model, "g")
    np.testing.assert_allclose(run(found, x)[0], n @ values(model, "v"), rtol=1e-3, atol=1e-3)
    assert histogram(found) == {"INT8": 1, "FLOAT": 1}


def test_weights_are_stored_per_channel_in_eight_bits(model: onnx.ModelProto) -> None:
    prepared = qdq.prepared(model, "toy", INT8)
    found = qdq.quantized(prepared, "toy", INT8, {"x": 3.0, "n": 20.0})
    stored = {i.name: numpy_helper.to_array(i) for i in found.graph.initializer}
    kinds = {name: (v.dtype.name, v.shape) for name, v in stored.items() if v.ndim == 2}
    assert set(kinds.values()) == {("int8", (8, 16)), ("int8", (16, 16))}
    scales = next(v for n, v in stored.items() if n.startswith("w.") and n.endswith("_scale"))
    np.testing.assert_allclose(scales, np.abs(values(model, "w")).max(axis=1) / 127, rtol=1e-6)
    zero_points = [v for n, v in stored.items() if n.endswith("_zero_point")]
    assert zero_points
    assert all(v.dtype == np.int8 and not v.any() for v in zero_points)  # symmetric


def test_fp8_values_are_those_of_the_type(model: onnx.ModelProto) -> None:
    plan = Plan("fp8", "fp32", (Keep("out", "stays", "rest"),))
    found = qdq.quantized(qdq.prepared(model, "toy", plan), "toy", plan, {"x": 3.0})
    onnx.checker.check_model(found, full_check=True)
    assert histogram(found) == {"FLOAT8E4M3FN": 1, "FLOAT": 1}
    x = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)

    def fp8(v: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.clip(v / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    weight = values(model, "w")
    h = fp8(x, np.float32(3 / 448)) @ fp8(weight, np.abs(weight).max(1, keepdims=True) / 448).T
    h = h + values(model, "b")
    n = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * values(model, "g")
    np.testing.assert_allclose(run(found, x)[0], n @ values(model, "v"), rtol=1e-3, atol=1e-3)


def test_weights_alone_leave_the_activation_as_it_is(model: onnx.ModelProto) -> None:
    plan = Plan("int8", "fp32", (Keep("out", "sensitive", "int8_weights"),))
    prepared = qdq.prepared(model, "toy", plan)
    found = qdq.quantized(prepared, "toy", plan, {"x": 3.0})
    assert histogram(found) == {"INT8": 1, "INT8_WEIGHTS": 1}
    node = next(n for n in found.graph.node if n.name == "out/linear/MatMul")
    assert node.input[0] == "n"
    first = Plan("int8", "fp32", (Keep("fc", "reads the graph's own input", "int8_weights"),))
    assert histogram(qdq.quantized(prepared, "toy", first, {"n": 9.0})) == {"INT8": 1, "INT8_WEIGHTS": 1}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("engine", ["onnxruntime", "modelopt"])
def test_an_output_that_a_product_reads_is_not_rounded(precision: PlanPrecision, engine: Engine) -> None:
    """`n` feeds the second product and leaves the graph, as the mentor does: only the product sees its eight bits."""
    if engine == "modelopt":
        pytest.importorskip(
            "modelopt", reason="nvidia-modelopt is not installed; it wants its own environment"
        )
    rng = np.random.default_rng(0)
    model = toy(rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=64).astype(np.float32))
    model.graph.output.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, ["R", 64]))
    onnx.helper.set_model_props(model, {"read by": "the runtime"})
    runs = [{"x": rng.normal(size=(128, 32)).astype(np.float32)}]
    plan = Plan(precision, "fp32", (Keep("^toy:fc/", "so that n is exact", "rest"),))
    found = Graph(model, "toy", runs, plan, Settings(engine=engine)).written(plan)
    onnx.checker.check_model(found, full_check=True)
    assert [v.name for v in found.graph.output] == ["y", "n"]
    assert {p.key: p.value for p in found.metadata_props} == {"read by": "the runtime"}
    y, n = run(found, runs[0]["x"])
    full_y, full_n = run(model, runs[0]["x"])
    np.testing.assert_allclose(n, full_n, rtol=1e-5, atol=1e-5)
    assert 1e-4 < np.abs(y - full_y).max() < 0.1 * np.abs(full_y).max()


def test_a_half_rest_types_the_scales_too(model: onnx.ModelProto) -> None:
    plan = default_plan("int8", "fp16")
    x = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    graph = Graph(model, "toy", [{"x": x}], plan, Settings())
    found = graph.written(plan)
    onnx.checker.check_model(found, full_check=True)
    by_name = {i.name: i for i in found.graph.initializer}
    scales = {by_name[n.input[1]].data_type for n in found.graph.node if n.op_type == "QuantizeLinear"}
    assert scales == {TensorProto.FLOAT16}
    assert next(o.version for o in found.opset_import if not o.domain) == 19
    full = run(model, x)[0]
    assert np.abs(run(found, x)[0] - full).max() < 0.05 * np.abs(full).max()


def test_smoothquant_computes_the_same_before_rounding_and_less_error_after(model: onnx.ModelProto) -> None:
    from m3ad_calibrate.ranges import observe
    from m3ad_calibrate.smooth import smoothable, smoothed

    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 8)).astype(np.float32)
    prepared = qdq.prepared(model, "toy", INT8)
    names = smoothable(prepared)
    assert list(names) == ["n"]
    smooth = smoothed(prepared, observe(prepared, [{"x": x}], names))
    np.testing.assert_allclose(run(smooth, x)[0], run(model, x)[0], rtol=1e-4, atol=1e-4)
    only_last = Plan("int8", "fp32", (Keep("fc", "fp32 here", "rest"),))
    plain = Graph(model, "toy", [{"x": x}], only_last, Settings()).written(only_last)
    better = Graph(model, "toy", [{"x": x}], only_last, Settings(smoothquant=True)).written(only_last)
    small = np.argsort(values(model, "g"))[:4]  # channels that an outlier channel's scale drowns
    small = 15 - small  # the last product turns the channels around
    full = run(model, x)[0][:, small]
    assert (
        np.abs(run(better, x)[0][:, small] - full).max()
        < 0.5 * np.abs(run(plain, x)[0][:, small] - full).max()
    )


@pytest.mark.parametrize("stage", ["rgb_extractor", "xyz_encoder", "mfm", "mgm", "head_tokens", "head_rows"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_every_graph_of_a_bundle_takes_the_default_plan(
    tiny_bundle: Bundle, stage: str, precision: str
) -> None:
    model = onnx.load(tiny_bundle.file(f"onnx/{stage}.onnx"))
    plan = default_plan(precision)  # type: ignore[arg-type]
    prepared = qdq.prepared(model, stage, plan)
    limits = dict.fromkeys(qdq.activations(prepared, stage, plan), 4.0)
    found = qdq.quantized(prepared, stage, plan, limits)
    onnx.checker.check_model(found, full_check=True)
    dequantized = {o for n in found.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    kept = re.compile(r"attn/matmul|patch_embed|pos_embed|first_conv|second_conv\.0|_rotation/")
    for node in found.graph.node:
        wanted = node.op_type in ("MatMul", "Gemm", "Conv") and not kept.search(node.name)
        assert dequantized.issuperset(node.input) == wanted, node.name
        assert wanted or not dequantized & set(node.input), node.name
    assert [v.name for v in found.graph.output] == [v.name for v in model.graph.output]
    assert dequantized.isdisjoint(v.name for v in found.graph.output)


def test_modelopt_is_asked_for_by_name(model: onnx.ModelProto) -> None:
    if find_spec("modelopt"):
        pytest.skip("ModelOpt is installed")
    with pytest.raises((MissingDependencyError, M3adError), match="nvidia-modelopt is not installed"):
        quantized_by_modelopt(model, "toy", INT8, [], "max")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_modelopt_writes_the_same_plan(precision: PlanPrecision) -> None:
    """Its scales are its own; the products, the stored weights and the result are those of our writer."""
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed; it wants its own environment")
    rng = np.random.default_rng(0)
    model = toy(rng.normal(size=(64, 32)).astype(np.float32), 0.1 * rng.normal(size=64).astype(np.float32))
    runs = [{"x": rng.normal(size=(128, 32)).astype(np.float32)} for _ in range(3)]
    plan = Plan(precision, "fp32", (Keep("^toy:out/", "kept by hand", "rest"),))
    theirs, ours = (
        Graph(model, "toy", runs, plan, Settings(engine=engine)).written(plan)
        for engine in ("modelopt", "onnxruntime")
    )
    onnx.checker.check_model(theirs, full_check=True)
    assert (
        histogram(theirs)
        == histogram(ours)
        == {{"int8": "INT8", "fp8": "FLOAT8E4M3FN"}[precision]: 1, "FLOAT": 1}
    )
    exact, x = run(model, runs[0]["x"])[0], runs[0]["x"]
    weight = values(model, "w").T
    for found, suffix in ((theirs, "QuantizeLinear_Output"), (ours, "quantized")):
        scale = values(found, "w.columns_scale")
        error = np.abs(values(found, f"w.columns_{suffix}").astype(np.float32) * scale - weight)
        # One rounding: half a step of INT8, 1/16 of the value in FP8 (half of 2^-9 steps where it is subnormal).
        step = scale / 2 if precision == "int8" else np.maximum(np.abs(weight) / 16, scale * 2.0**-10)
        assert (error <= step * (1 + 1e-5)).all()
        assert 0 < np.abs(run(found, x)[0] - exact).max() < 0.1 * np.abs(exact).max()
    whole = Graph(model, "toy", runs, Plan(precision, "fp32", ()), Settings(engine="modelopt"))
    with pytest.raises(M3adError, match="the plan has int8_weights entries, which ModelOpt cannot write"):
        whole.written(Plan(precision, "fp32", (Keep("^toy:fc/", "by hand", "int8_weights"),)))
    with pytest.raises(M3adError, match="ModelOpt calibrates by max or entropy, got 'mse'"):
        Graph(model, "toy", runs, plan, Settings(engine="modelopt", method="mse")).written(plan)
