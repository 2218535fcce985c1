"""INT8 convolutions as the quantizer writes them: which, with which scales, and how much work they are."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from m3ad.errors import M3adError
from m3ad.methods import METHODS
from m3ad_calibrate import qdq
from m3ad_calibrate.modelopt import quantized_by_modelopt
from m3ad_calibrate.quantize import Graph, Settings
from m3ad_calibrate.sensitivity import find_groups
from m3ad_export.engine_builder import build_plan, builder_module
from m3ad_export.graphs.plan import Keep, Plan, default_plan
from m3ad_export.graphs.precision import histogram
from m3ad_runtime.onnx_graph import RUN_AS_WRITTEN, OnnxGraph
from onnx import TensorProto, helper, numpy_helper

INT8 = Plan("int8", "fp32", ())
SHAPES = {"w": (6, 4, 3, 3), "v": (6, 4, 2, 2), "u": (4, 1, 3, 3), "t": (4, 3, 1, 1)}


@pytest.fixture
def model() -> onnx.ModelProto:
    """A strided convolution with a bias, a transposed one, a depthwise one, and a transposed one of groups."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights["w"][2] *= 50  # a channel that a scale for all would drown the others with
    weights["b"] = rng.normal(size=6).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["h"], name="first/Conv", strides=[2, 2], pads=[1] * 4),
            helper.make_node("Relu", ["h"], ["r"], name="first/Relu"),
            helper.make_node("ConvTranspose", ["r", "v"], ["g"], name="grow/ConvTranspose", strides=[2, 2]),
            helper.make_node("Conv", ["g", "u"], ["d"], name="deep/Conv", group=4, pads=[1] * 4),
            helper.make_node("ConvTranspose", ["d", "t"], ["y"], name="apart/ConvTranspose", group=2),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def values(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def written(model: onnx.ModelProto, plan: Plan, x: np.ndarray) -> onnx.ModelProto:
    found = Graph(model, "toy", [{"x": x}], plan, Settings()).written(plan)
    onnx.checker.check_model(found, full_check=True)
    return found


def test_each_output_channel_has_its_scale_and_the_bias_none(model: onnx.ModelProto) -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    found = written(model, INT8, x)
    axes = {"w": (1, 2, 3), "v": (0, 2, 3), "u": (1, 2, 3)}  # all but the output channels
    for name, others in axes.items():
        weight = values(model, name)
        scale = np.abs(weight).max(axis=others) / 127
        np.testing.assert_allclose(values(found, f"{name}_scale"), scale, rtol=1e-6)
        steps = np.rint(weight / scale.reshape([-1 if d not in others else 1 for d in range(4)]))
        stored = values(found, f"{name}_quantized")
        assert stored.dtype == np.int8
        assert np.abs(stored - steps).max() <= 1  # a tie may fall either way
        assert np.mean(stored == steps) > 0.99
    np.testing.assert_allclose(values(found, "x_scale"), np.abs(x).max() / 127, rtol=1e-6)
    np.testing.assert_array_equal(values(found, "b"), values(model, "b"))
    by_name = {node.name: node for node in found.graph.node}
    assert by_name["first/Conv"].input[2] == "b"
    assert by_name["apart/ConvTranspose"].input[1] == "t"  # its groups repeat the channels of axis 1
    assert histogram(found) == {"INT8": 3, "FLOAT": 1}
    assert not [node for node in found.graph.node if node.op_type == "QuantizeLinear" and "y" in node.input]


def test_the_map_is_the_formula_of_rounded_values(model: onnx.ModelProto) -> None:
    """Against a convolution in NumPy of values rounded to their scales, and far from one with another scale."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
    plan = Plan("int8", "fp32", (Keep("grow|deep|apart", "one layer at a time", "rest"),))
    found = written(model, plan, x)
    del found.graph.output[:]
    found.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 6, 4, 4]))
    h = OnnxGraph(found.SerializeToString(), 1)({"x": x})["h"]
    weight, bias = values(model, "w"), values(model, "b")

    def layer(step: float) -> np.ndarray:
        scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
        rounded = np.clip(np.rint(x[0] / step), -128, 127) * step
        padded = np.pad(rounded, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
        kernel = np.rint(weight / scale) * scale
        return np.einsum("cyxij,ocij->oyx", windows, kernel) + bias[:, None, None]

    step = float(np.abs(x).max()) / 127
    np.testing.assert_allclose(h[0], layer(step), atol=1e-4 * np.abs(h).max())
    assert np.abs(h[0] - layer(2 * step)).max() > 1e-3 * np.abs(h).max()


def test_weights_alone_and_a_half_rest(model: onnx.ModelProto) -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    plan = Plan("int8", "fp16", (Keep("grow", "sensitive", "int8_weights"), Keep("deep", "thin", "rest")))
    found = written(model, plan, x)
    assert histogram(found) == {"INT8": 1, "INT8_WEIGHTS": 1, "FLOAT16": 2}
    stored = {i.name: i for i in found.graph.initializer}
    scales = {stored[n.input[1]].data_type for n in found.graph.node if n.op_type == "DequantizeLinear"}
    assert scales == {TensorProto.FLOAT16}


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_an_engine_is_built_with_every_convolution_of_the_plan(model: onnx.ModelProto, rest: str) -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    plan = Plan("int8", rest, (Keep("deep", "sensitive", "int8_weights"),))  # type: ignore[arg-type]
    found = written(model, plan, x)
    built = build_plan(builder_module("sm89")[0], found.SerializeToString(), "toy", "sm89")
    asked = histogram(found)
    assert asked.items() >= {"INT8": 2, "INT8_WEIGHTS": 1}.items()
    assert built.precision_histogram == asked


def test_the_runtime_is_told_of_convolutions_and_of_nothing_else(model: onnx.ModelProto) -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    assert RUN_AS_WRITTEN in {p.key for p in written(model, INT8, x).metadata_props}
    none = Plan("int8", "fp32", (Keep("", "all kept", "rest"),))
    assert RUN_AS_WRITTEN not in {p.key for p in written(model, none, x).metadata_props}


def test_fp8_and_modelopt_leave_convolutions_alone(model: onnx.ModelProto) -> None:
    plan = default_plan("fp8")
    assert qdq.products(qdq.prepared(model, "toy", plan), "toy", plan) == {}
    assert qdq.nothing_for(plan, Path("some")) == (
        "some has no matrix product for fp8, which is not for convolutions; quantize it to int8 or fp16"
    )
    kept = Plan("int8", "fp32", (Keep("", "all kept", "rest"),))
    assert qdq.nothing_for(kept, Path("some")).startswith("the plan keeps every product of some in floating")
    with pytest.raises(M3adError, match="toy has convolutions, which --engine modelopt does not quantize"):
        quantized_by_modelopt(qdq.prepared(model, "toy", INT8), "toy", INT8, [], "max")


def test_the_work_of_convolutions_is_counted(model: onnx.ModelProto) -> None:
    """Multiply-adds by hand: pixels made x inputs x kernel, of a transposed one pixels read x outputs x kernel."""
    model.graph.node[0].name = "network.layer1.0.conv1/Conv"
    model.graph.node[2].name = "network.layer2.0.conv1/ConvTranspose"
    model.graph.node[3].name = "network.layer2.1.conv1/Conv"
    groups = find_groups({"rgb_rows": model}, METHODS["btf"], 100, INT8)
    macs = {"image layer 1": 6 * 16 * 4 * 9, "image layer 2": 6 * 16 * 4 * 4 + 4 * 64 * 1 * 9}
    assert {g.name: g.share for g in groups} == {
        name: pytest.approx(count / sum(macs.values())) for name, count in macs.items()
    }


@pytest.mark.parametrize(
    ("node", "precision"),
    [
        ("teacher:network.conv1/conv2d/Conv", "rest"),
        ("rgb_rows:stem/conv2d/Conv", "rest"),
        ("rgb_encoder:_conv_stem/conv2d/Conv", "rest"),
        ("rgb_encoder:_blocks.3._depthwise_conv/conv2d_14/Conv", "rest"),
        ("rgb_encoder:_blocks.3._se_reduce/conv2d_15/Conv", "rest"),
        ("rgb_rows:pools.1/matmul_3/MatMul", "rest"),
        ("rgb_decoder_windows:decoder.conv_decoder.0/conv2d/Conv", "rest"),
        ("rgb_encoder:_blocks.3._expand_conv/conv2d_13/Conv", "int8"),
        ("teacher:network.layer1.0.conv1/conv2d_1/Conv", "int8"),
        ("teacher:couplings.0.s2.conv1/conv2d/Conv", "int8"),
        ("rgb_student:decoder.layer1.0.conv2/conv_transpose2d/ConvTranspose", "int8"),
        ("rgb_student:projector_filter.conv_a.0/conv2d/Conv", "int8"),
    ],
)
def test_the_default_plan_keeps_what_gains_nothing(node: str, precision: str) -> None:
    stage, _, name = node.partition(":")
    choice = default_plan("int8").choice(stage, onnx.NodeProto(name=name))
    assert choice.precision == precision
    assert bool(choice.reason) == (precision == "rest")
    named = [name for method in METHODS.values() for name, p in method.groups.items() if re.search(p, node)]
    assert named or precision == "rest"
