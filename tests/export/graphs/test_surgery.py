"""What the library and its wrapper leave as it was, on models that hold everything a bundle's graphs hold."""

import gc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from m3ad.bundle import Bundle
from m3ad_calibrate.smooth import smoothable
from m3ad_export.graphs import surgery
from m3ad_export.graphs.surgery import cast, edited, element_type
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

PLAIN = ("rgb_extractor", "xyz_extractor", "xyz_encoder_cpu", "project", "vm", "head_rows")


def untouched(_: gs.Graph) -> None:
    pass


def small_types() -> onnx.ModelProto:
    """y = x + w twice and a weight that no one reads; the weights in types NumPy does not know."""
    types = {"a": ml_dtypes.bfloat16, "b": ml_dtypes.float8_e4m3fn, "unread": np.float32}
    weights = [
        numpy_helper.from_array(np.linspace(-3, 3, 4).astype(dtype), name) for name, dtype in types.items()
    ]
    nodes = [
        helper.make_node("Cast", ["b"], ["wide"], name="last in the file, first to run", to=1),
        helper.make_node("Cast", ["a"], ["w"], name="a/Cast", to=1),
        helper.make_node("Add", ["x", "w"], ["h"], name="fc/Add"),
        helper.make_node("Relu", ["h"], ["nobody's"], name="unread/Relu"),
        helper.make_node("Add", ["h", "wide"], ["y"], name="fc2/Add"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "toy", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, {"read by": "the runtime"})
    return model


@pytest.mark.parametrize("name", PLAIN)
def test_a_graph_that_nobody_edits_stays_byte_by_byte(tiny_bundle: Bundle, name: str) -> None:
    """Opsets (that of the custom ops too), IR version, metadata, function bodies, names and the order of nodes."""
    model = onnx.load(tiny_bundle.file(f"onnx/{name}.onnx"))
    before = model.SerializeToString(deterministic=True)
    found = edited(model, untouched)
    assert model.SerializeToString(deterministic=True) == before
    used = {n for node in model.graph.node for n in node.input}
    for unread in [i for i in model.graph.initializer if i.name not in used]:
        model.graph.initializer.remove(unread)
    live = {n for node in found.graph.node for n in node.output}
    assert live == {n for node in model.graph.node for n in node.output}
    assert [n.SerializeToString() for n in found.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]
    assert [f.SerializeToString(deterministic=True) for f in found.functions] == [
        f.SerializeToString(deterministic=True) for f in model.functions
    ]
    assert [i.name for i in found.graph.initializer] == [i.name for i in model.graph.initializer]
    for field in ("opset_import", "metadata_props", "ir_version", "producer_name"):
        assert getattr(found, field) == getattr(model, field), field
    assert found.graph.metadata_props == model.graph.metadata_props
    assert [*found.graph.input, *found.graph.output] == [*model.graph.input, *model.graph.output]


def test_small_types_pass_through_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """A command with --json has one document on stdout."""
    model = small_types()
    found = edited(onnx.shape_inference.infer_shapes(model), untouched)
    onnx.checker.check_model(found, full_check=True)
    assert [i.SerializeToString() for i in found.graph.initializer] == [
        i.SerializeToString() for i in model.graph.initializer[:2]
    ]
    assert [n.name for n in found.graph.node] == [n.name for n in model.graph.node if n.name != "unread/Relu"]
    assert not found.graph.value_info
    assert {p.key: p.value for p in found.metadata_props} == {"read by": "the runtime"}
    assert capfd.readouterr() == ("", "")


def test_weights_in_a_file_stay_there(tmp_path: Path) -> None:
    model = small_types()
    for weight in model.graph.initializer:
        set_external_data(weight, "toy.weights")
    onnx.save(model, tmp_path / "toy.onnx")
    outside = onnx.load(tmp_path / "toy.onnx", load_external_data=False)
    onnx.save(edited(outside, untouched), tmp_path / "again.onnx")
    for name, dtype in (("a", ml_dtypes.bfloat16), ("b", ml_dtypes.float8_e4m3fn)):
        again = onnx.load(tmp_path / "again.onnx").graph.initializer
        weight = next(i for i in again if i.name == name)
        np.testing.assert_array_equal(numpy_helper.to_array(weight), np.linspace(-3, 3, 4).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8])
def test_new_weights_keep_their_type(dtype: type) -> None:
    """And the same edit writes the same bytes."""
    values = np.linspace(-3, 3, 4).astype(dtype)

    def replace(graph: gs.Graph) -> None:
        weight, wide = gs.Constant("new", values), gs.Variable("new.wide")
        graph.nodes.insert(0, cast(weight, wide, TensorProto.FLOAT))
        next(node for node in graph.nodes if node.name == "fc/Add").inputs[1] = wide
        assert element_type(weight) == helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    found = edited(small_types(), replace)
    stored = next(i for i in found.graph.initializer if i.name == "new")
    assert numpy_helper.to_array(stored).tobytes() == values.tobytes()
    assert stored.data_type == helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert [i.name for i in found.graph.initializer] == ["b", "new"]
    assert edited(small_types(), replace).SerializeToString() == found.SerializeToString()


def test_a_large_graph_does_not_outlive_its_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each edit of a search would hold the weights of the one before."""
    monkeypatch.setattr(surgery, "LEFT_TO_COLLECTOR", 0)
    seen: list[weakref.ref[gs.Graph]] = []
    gc.disable()
    try:
        edited(small_types(), lambda graph: seen.append(weakref.ref(graph.nodes[0])))
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_norm_that_leaves_the_graph_is_not_smoothed(leaves: bool) -> None:
    """Whoever reads that output reads it unscaled."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "o"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="fc"),
    ]
    x, y, n = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", 4]) for name in "xyn")
    ones = {"g": np.ones(4, np.float32), "o": np.zeros(4, np.float32), "w": np.eye(4, dtype=np.float32)}
    weights = [numpy_helper.from_array(value, name) for name, value in ones.items()]
    graph = helper.make_graph(nodes, "toy", [x], [y, n] if leaves else [y], weights)
    assert smoothable(helper.make_model(graph)) == ([] if leaves else ["n"])
