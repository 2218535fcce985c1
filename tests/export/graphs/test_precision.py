import numpy as np
import onnx
import onnxruntime as ort
import pytest
from m3ad.bundle import Bundle
from m3ad_export.graphs.plan import default_plan
from m3ad_export.graphs.precision import half_model, histogram
from onnx import TensorProto, helper, numpy_helper

FP16 = default_plan("fp16")


def matmul_model(weight: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="fc/linear/MatMul"),
            helper.make_node(
                "LayerNormalization", ["h", "g"], ["n"], name="norm/layer_norm/LayerNormalization"
            ),
            helper.make_node("MatMul", ["n", "w"], ["y"], name="fc2/linear/MatMul"),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(8, np.float32), "g")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def test_half_rounds_weights_and_activations_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(8, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    model = matmul_model(weight)
    half = half_model(model, "toy", FP16)
    onnx.checker.check_model(half, full_check=True)
    assert histogram(model) == {"FLOAT": 2}
    assert histogram(half) == {"FLOAT16": 2}
    h = (x.astype(np.float16) @ weight.astype(np.float16)).astype(np.float32)  # then an fp32 norm
    n = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
    expected = n.astype(np.float16) @ weight.astype(np.float16)
    np.testing.assert_allclose(run(half, x), expected, atol=2e-2)
    assert np.abs(run(half, x) - run(model, x)).max() > 0
    assert {i.data_type for i in half.graph.initializer} == {TensorProto.FLOAT16, TensorProto.FLOAT}


def test_a_weight_beyond_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match="weight w holds values beyond fp16's 65504"):
        half_model(matmul_model(np.full((8, 8), 1e5, np.float32)), "toy", FP16)


@pytest.mark.parametrize(
    "stage", ["rgb_extractor", "xyz_extractor", "project", "mfm", "mgm", "vm", "head_rows"]
)
def test_norms_cosines_and_voting_stay_fp32_in_every_stage(tiny_bundle: Bundle, stage: str) -> None:
    model = onnx.load(tiny_bundle.file(f"onnx/{stage}.onnx"))
    half = half_model(model, stage, FP16)
    halves = {i.name for i in half.graph.initializer if i.data_type == TensorProto.FLOAT16}
    halves |= {o for n in half.graph.node for o in n.output if o.endswith(".half")}
    for node in half.graph.node:
        if node.domain == "m3ad" or node.op_type in (
            "LayerNormalization",
            "Softmax",
            "ReduceL2",
            "ReduceSum",
        ):
            assert not halves & {*node.input, *node.output}, node.name
    interface = [v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)]
    assert TensorProto.FLOAT16 not in interface
    if stage in ("vm", "project"):
        assert not halves
    else:
        products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
        assert any(FP16.float_type(stage, n) == "fp16" for n in products)


def test_half_scores_follow_the_full_ones(tiny_bundle: Bundle) -> None:
    """Twice the error of rounding the inputs once is what fp16 matrix products may cost here."""
    mfm = onnx.load(tiny_bundle.file("onnx/mfm.onnx"))
    rng = np.random.default_rng(1)
    feed = {
        v.name: rng.normal(size=(300, v.type.tensor_type.shape.dim[1].dim_value)).astype(np.float32)
        for v in mfm.graph.input
    }
    full = ort.InferenceSession(mfm.SerializeToString()).run(None, feed)[0]
    half = ort.InferenceSession(half_model(mfm, "mfm", FP16).SerializeToString()).run(None, feed)[0]
    assert 0 < np.abs(full - half).max() < 2**-8 * np.abs(full).max()
