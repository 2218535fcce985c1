import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, M3adError, MissingDependencyError
from m3ad_export.engine import build_engines, stage_model
from m3ad_export.engine_types import verify_precision
from m3ad_export.graphs.precision import histogram

trt = pytest.importorskip("tensorrt_rtx", reason="extra rtx is not installed: pip install 'm3ad[rtx]'")


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    return Bundle.open(copy)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_builds_ahead_of_time(bundle: Bundle, precision: str) -> None:
    said: list[str] = []
    folder = build_engines(bundle, "sm89", precision, ("chain", "fused"), said.append)  # type: ignore[arg-type]
    manifest = json.loads((folder / "manifest.json").read_text())
    plans = {p.name for p in folder.glob("*.plan")}
    assert plans == set(manifest["files"])
    assert {
        "rgb_extractor.plan",
        "xyz_extractor.plan",
        "project.plan",
        "mfm.plan",
        "mgm.plan",
        "vm.plan",
    } <= plans
    assert (manifest["runtime"], manifest["compute_capability"], manifest["precision"]) == (
        "tensorrt_rtx",
        "8.9",
        precision,
    )
    for entry in manifest["files"].values():
        assert entry["bytes"] > 1000
        assert ("FLOAT16" in entry["precision_histogram"]) <= (precision == "fp16")
    assert len(said) == len(plans)
    Bundle.open(bundle.path)  # engines are no tampering


@pytest.mark.parametrize("with_plugins", [True, False])
@pytest.mark.parametrize("stage", ["project", "head"])
def test_no_size_depends_on_data(bundle: Bundle, stage: str, with_plugins: bool) -> None:
    """R is the length of an input, and a node of an op has as many outputs as its plugin."""
    model = stage_model(bundle.path / "onnx", stage, bundle.dims, "fp32", with_plugins=with_plugins)
    assert [v.name for v in model.graph.input][-1] == "scored_pixel"
    nodes = list(model.graph.node)
    assert not {"NonZero", "Unique", "Compress"} & {n.op_type for n in nodes}
    spread = [n for n in nodes if n.op_type == "TokenInterpolate"]
    assert len(spread) == with_plugins
    for node in spread:
        assert (len(node.input), len(node.output)) == (5, 1)
        version = {a.name: a.s for a in node.attribute}["plugin_version"]
        assert version == b"2"


def test_plugins_leave_no_function_body_to_be_taken_instead(bundle: Bundle) -> None:
    model = stage_model(bundle.path / "onnx", "xyz_extractor", bundle.dims, "fp16", with_plugins=True)
    assert not model.functions
    assert [n.op_type for n in model.graph.node if n.domain == "m3ad"] == ["FarthestPointSample", "KnnGroup"]
    assert (
        histogram(model)["FLOAT16"] >= 2 * 6
    )  # of each block: qkv, both of attention, its output, two of the MLP


def test_a_silent_fp32_engine_is_refused() -> None:
    verify_precision("mgm", {"FLOAT16": 8}, {"FLOAT16": 8, "FLOAT": 1})
    with pytest.raises(
        ArtifactError, match="stage mgm has 2 matrix products in FLOAT16, the ONNX file asks for 8"
    ):
        verify_precision("mgm", {"FLOAT16": 8}, {"FLOAT16": 2, "FLOAT": 6})


@pytest.mark.parametrize("target", ["sm87", "sm999", "gpu"])
def test_an_unknown_target_is_named(bundle: Bundle, target: str) -> None:
    with pytest.raises(M3adError, match=f"unknown target '{target}', expected native or one of sm75, sm80"):
        build_engines(bundle, target, "fp16")
    assert not (bundle.path / "engines").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="full TensorRT is installed here"
)
def test_native_without_tensorrt_says_what_to_install(bundle: Bundle) -> None:
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed: install TensorRT 10.3"):
        build_engines(bundle, "native", "fp16")


def test_a_file_the_parser_cannot_read_lists_its_errors(bundle: Bundle) -> None:
    path = bundle.file("onnx/mfm.onnx")
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("Nonsense", ["rgb_features"], ["lost"], domain="elsewhere"))
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"(?s)cannot read stage mfm:.*Nonsense.*Export the bundle again"):
        build_engines(bundle, "sm86", "fp32")
    assert not (bundle.path / "engines" / "sm86").exists()
