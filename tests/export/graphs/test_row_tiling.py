import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import TINY_XYZ, randomise
from m3ad.bundle import Bundle
from m3ad.contract import Dims
from m3ad.method import Contract
from m3ad.methods import contract_of
from m3ad_calibrate import qdq
from m3ad_export.graphs.compose import write_xyz_extractor, xyz_encoder_stage
from m3ad_export.graphs.plan import default_plan
from m3ad_export.graphs.precision import half_model
from m3ad_export.graphs.row_tiling import row_tiled
from m3ad_export.graphs.trace import dense_model
from m3ad_export.nets.configs import BnMode
from m3ad_export.nets.folded_pointnet import folded_encoder
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_runtime.onnx_graph import OnnxGraph
from onnx import helper, numpy_helper


def tokens(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    graph = OnnxGraph(model if isinstance(model, Path) else model.SerializeToString(), 2)
    return graph(inputs)["xyz_tokens"]


def some_groups(groups: int, size: int) -> dict[str, np.ndarray]:
    """Offsets of millimetres that differ between groups, so that a part's own statistics are not the frame's."""
    rng = np.random.default_rng(0)
    offsets = 1e-3 * rng.normal(size=(groups, size, 3)) * np.linspace(0.5, 2, groups)[:, None, None]
    return {
        "neighborhood": offsets.astype(np.float32),
        "centers": rng.normal(scale=0.1, size=(groups, 3)).astype(np.float32),
    }


def contract_with(groups: int) -> Contract:
    dims = Dims(groups=groups, group_size=TINY_XYZ.group_size, xyz_width=TINY_XYZ.token_width)
    return contract_of("mentor3ad", dims)


def encoder(mode: BnMode, groups: int) -> onnx.ModelProto:
    net = PointMaeEncoder(replace(TINY_XYZ, bn_mode=mode, groups=groups))
    randomise(net, 3)
    return dense_model(folded_encoder(net.eval()), xyz_encoder_stage(contract_with(groups)))


@pytest.mark.parametrize(
    ("mode", "groups", "asked", "found"), [("sample", 64, 16, 16), ("running", 36, 16, 4)]
)
def test_parts_compute_what_the_whole_computes(mode: BnMode, groups: int, asked: int, found: int) -> None:
    whole = encoder(mode, groups)
    parts = row_tiled(whole, asked)
    onnx.checker.check_model(parts, full_check=True)
    counts = [Counter(node.op_type for node in model.graph.node) for model in (whole, parts)]
    assert (counts[0]["ReduceMax"], counts[1]["ReduceMax"]) == (2, 2 * found)
    inputs = some_groups(groups, TINY_XYZ.group_size)
    expected = tokens(whole, inputs)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(tokens(parts, inputs), expected, rtol=0, atol=1e-5)


def test_groups_that_cannot_be_divided_stay_whole() -> None:
    whole = encoder("sample", 37)
    assert row_tiled(whole) is whole


def test_a_value_in_parts_is_joined_for_each_node_that_reads_all_of_it() -> None:
    """A pair of quantization does this: the products read its rows, the statistics the whole."""
    whole = encoder("sample", 64)
    nodes = whole.graph.node
    relu = next(i for i, node in enumerate(nodes) if node.op_type == "Relu")
    start = nodes[relu].output[0]
    for node in nodes[relu + 1 :]:
        node.input[:] = ["again" if name == start else name for name in node.input]
    nodes.insert(relu + 1, helper.make_node("Mul", [start, "two"], ["again"], name="again"))
    whole.graph.initializer.append(numpy_helper.from_array(np.full(1, 2, np.float32), "two"))
    parts = row_tiled(whole)
    onnx.checker.check_model(parts, full_check=True)
    inputs = some_groups(64, TINY_XYZ.group_size)
    np.testing.assert_allclose(tokens(parts, inputs), tokens(whole, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp16"])
def test_a_plan_s_precision_is_kept(tiny_bundle: Bundle, precision: str) -> None:
    """Quantized and half graphs have other nodes between the products; all of them go in parts."""
    model = onnx.load(tiny_bundle.path / "onnx" / "xyz_encoder.onnx")
    plan = default_plan(precision)  # type: ignore[arg-type]
    if precision != "fp16":
        model = qdq.prepared(model, "xyz_encoder", plan)
        limits = dict.fromkeys(qdq.activations(model, "xyz_encoder", plan), 4.0)
        model = qdq.quantized(model, "xyz_encoder", plan, limits)
    whole = half_model(model, "xyz_encoder", plan)
    assert Counter(node.op_type for node in row_tiled(whole).graph.node)["ReduceMax"] == 2 * 16
    inputs = some_groups(TINY_XYZ.groups, TINY_XYZ.group_size)
    expected, found = tokens(whole, inputs), tokens(row_tiled(whole), inputs)
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_all_forms_share_one_weights_file_that_anyone_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a working directory that has a file of that name, which onnx.save refuses."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "xyz_encoder.weights").write_bytes(b"another bundle's")
    monkeypatch.chdir(elsewhere)
    whole = encoder("sample", 64)
    inputs = some_groups(64, TINY_XYZ.group_size)
    expected = tokens(whole, inputs)
    before = os.umask(0o022)
    try:
        write_xyz_extractor(whole, contract_with(64), tmp_path)
    finally:
        os.umask(before)
    weights = tmp_path / "xyz_encoder.weights"
    assert weights.stat().st_mode & 0o777 == 0o644
    files = [tmp_path / f"{name}.onnx" for name in ("xyz_encoder", "xyz_encoder_cpu", "xyz_extractor")]
    for file in files[:2]:
        np.testing.assert_allclose(tokens(file, inputs), expected, rtol=0, atol=1e-5)
    for file in files:
        graph = onnx.load(file, load_external_data=False).graph
        outside = [i for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
        assert outside
        assert all(len(i.raw_data) < 1024 for i in graph.initializer), file
        places = {e.value for i in outside for e in i.external_data if e.key == "location"}
        assert places == {"xyz_encoder.weights"}
