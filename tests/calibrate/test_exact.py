"""Every graph of a quantized bundle as the CPU runtime opens it, against the same graph run node by node."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from m3ad.bundle import Bundle
from m3ad_calibrate.quantize import Graph, Settings
from m3ad_export.graphs.plan import Keep, Plan, default_plan
from m3ad_runtime.onnx_graph import AS_WRITTEN, EXACT, INEXACT_REWRITES, UNSIGNED_WEIGHTS, OnnxGraph

STAGES = ("rgb_extractor", "xyz_encoder", "mfm", "mgm", "head_tokens", "head_rows")
INT8 = default_plan("int8")
PLANS = {
    "int8": INT8,
    "int8 weights": Plan("int8", "fp32", (*INT8.keep, Keep("", "weights alone", "int8_weights"))),
    "fp8": default_plan("fp8"),
}


def inputs_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Normal values in the shapes a graph takes, 96 where it takes any number of rows."""
    rng = np.random.default_rng(0)
    shapes = {v.name: [d.dim_value or 96 for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def node_by_node(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feed)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_computes_what_it_says(tiny_bundle: Bundle, stage: str, plan: str) -> None:
    """To rounding; where that puts a value on the other side of a step, what depends on it moves by a step's part.

    Sums that saturate are wrong by 0.1 to 0.4, FP8 pairs that a rewrite moved by 0.9.
    """
    model = onnx.load(tiny_bundle.file(f"onnx/{stage}.onnx"))
    feed = inputs_of(model)
    written = Graph(model, stage, [feed], PLANS[plan], Settings()).written(PLANS[plan])
    graph = OnnxGraph(written.SerializeToString(), 1)
    for found, wanted in zip(graph(feed).values(), node_by_node(written, feed), strict=True):
        assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
        if stage not in ("rgb_extractor", "xyz_encoder"):  # whose attention hands one row's step to all
            rows = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max()
            assert np.mean(rows < 1e-5) > 0.8


@pytest.mark.parametrize("stage", STAGES)
def test_every_int8_product_runs_as_one(tiny_bundle: Bundle, tmp_path: Path, stage: str) -> None:
    """Also those that share an activation or a weight, and those with a bias; none is left in fp32 behind its pairs."""
    model = onnx.load(tiny_bundle.file(f"onnx/{stage}.onnx"))
    feed = inputs_of(model)
    written = Graph(model, stage, [feed], INT8, Settings()).written(INT8)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in (EXACT | UNSIGNED_WEIGHTS).items():
        options.add_session_config_entry(key, value)
    ort.InferenceSession(written.SerializeToString(), options, disabled_optimizers=INEXACT_REWRITES)
    run = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    pairs = {o for n in written.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    products = [n for n in written.graph.node if n.op_type == "MatMul" and pairs.issuperset(n.input)]
    assert run.count("MatMulIntegerToFloat") == len(products) > 0
    assert "DequantizeLinear" not in run
    opened = OnnxGraph(written.SerializeToString(), 1).session.get_session_options()
    with pytest.raises(RuntimeError, match="config"):  # never set: the first way of opening it was taken
        opened.get_session_config_entry(*AS_WRITTEN)
