import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from conftest import make_input, make_tiny_detector
from m3ad.bundle import Bundle, new_folder
from m3ad.contract import CONTRACT_VERSION
from m3ad.errors import ArtifactError
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.detector import Detector
from m3ad_export.graphs.export import write_graphs
from m3ad_export.graphs.parity import check_parity, verify_parity
from m3ad_export.graphs.verify import values_read, verify_not_frozen
from m3ad_runtime.pipeline import Inspector, model_arrays


def test_every_stage_file_has_the_contract_s_tensors(tiny_bundle: Bundle) -> None:
    for name, stage in tiny_bundle.contract.stages.items():
        graph = onnx.load(tiny_bundle.file(f"onnx/{name}.onnx"), load_external_data=False).graph
        assert [v.name for v in graph.input] == [t.name for t in stage.inputs]
        assert [v.name for v in graph.output] == [t.name for t in stage.outputs]


def test_golden_files_are_the_values_of_one_frame(tiny_bundle: Bundle) -> None:
    golden = {p.stem: np.load(p) for p in (tiny_bundle.path / "golden").glob("*.npy")}
    for stage in tiny_bundle.contract.stages.values():
        for tensor in (*stage.inputs, *stage.outputs):
            assert tensor.mismatch(golden[tensor.name]) is None
    assert golden["score"][0] == golden["anomaly_map"].max()


@pytest.mark.parametrize("points", [1024, 4321])
def test_the_layouts_agree_in_process(tiny_bundle: Bundle, points: int) -> None:
    prepared = make_input(points, seed=points)
    chain, fused = (
        Inspector(tiny_bundle, layout).inspect_prepared(prepared) for layout in ("chain", "fused")
    )
    np.testing.assert_allclose(fused.anomaly_map, chain.anomaly_map, atol=1e-5)
    assert fused.score == pytest.approx(chain.score, abs=1e-5)
    assert list(chain.stage_ms).count("mfm") == 1
    assert "mfm again" in chain.stage_ms


def test_parity_figures_are_in_the_manifest(tiny_bundle: Bundle) -> None:
    parity = tiny_bundle.document["parity"]
    assert parity["points"] == [1024, 1025]
    assert parity["anomaly_map_max_error"] <= 1e-4
    assert parity["anomaly_map_rank_correlation"] >= 0.9999


def test_an_export_that_differs_from_torch_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import m3ad_export.bundle_writer as writer

    detector = make_tiny_detector()
    honest = writer.write_graphs

    def write_other_weights(_: Detector, *arguments: Any) -> None:
        other = make_tiny_detector()
        other.networks["mgm"].to_rgb.output.weight.data += 0.05
        honest(other, *arguments)

    monkeypatch.setattr(writer, "write_graphs", write_other_weights)
    with pytest.raises(ArtifactError, match=r"ONNX and PyTorch disagree in \d+ of \d+ values"):
        write_bundle(detector, make_input(2000), tmp_path / "b", layouts=("chain",), parity_points=(1024,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        ("idx", "point_pixel, KnnGroup's idx"),
        ("points", "FarthestPointSample's points"),
        ("point_pixel", "point_pixel, FarthestPointSample's point_pixel"),
    ],
)
def test_sampling_frozen_into_a_graph_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, frozen: str, names: str
) -> None:
    model = onnx.load(tiny_bundle.file("onnx/xyz_extractor.onnx"))
    (sampler,) = (n for n in model.graph.node if n.op_type == "FarthestPointSample")
    assert list(sampler.input) == ["points", "point_pixel"]
    constants = {
        "idx": np.arange(64, dtype=np.int32),
        "points": np.zeros((1024, 3), np.float32),
        "point_pixel": np.arange(1024, dtype=np.int32),
    }
    name = frozen if frozen == "idx" else "constant"
    if frozen == "idx":
        model.graph.node.remove(sampler)
    else:
        sampler.input[["points", "point_pixel"].index(frozen)] = name
    model.graph.initializer.append(onnx.numpy_helper.from_array(constants[frozen], name))
    onnx.save(model, tmp_path / "frozen.onnx")
    with pytest.raises(ArtifactError, match=rf"sampling was frozen into the graph \({names} does not depend"):
        verify_not_frozen(tmp_path / "frozen.onnx")


def test_extractor_reads_its_pixels_also_once_its_ops_are_inlined(tiny_bundle: Bundle) -> None:
    """A runtime without the plugin inlines the bodies; an input that no node read would be lost there."""
    model = onnx.load(tiny_bundle.file("onnx/xyz_extractor.onnx"), load_external_data=False)
    inlined = onnx.inliner.inline_local_functions(model)
    needed = {value.name for value in inlined.graph.output}
    for node in reversed(inlined.graph.node):
        if needed & {*node.output}:
            needed |= values_read(node)
    assert {"points", "point_pixel"} == {v.name for v in inlined.graph.input} <= needed


def test_maps_of_large_values_may_differ_by_as_much_of_them(tiny_detector: Detector, tmp_path: Path) -> None:
    detector = copy.deepcopy(tiny_detector)
    detector.networks["vm"].baseline = torch.full_like(detector.networks["vm"].baseline, 1e-4)
    write_graphs(detector, ("chain",), tmp_path)
    image = make_input(1024).image
    deviations = check_parity(detector, tmp_path, image, ("chain",), (1025,))
    verify_parity(deviations)
    maps = [d for d in deviations if d.value == "anomaly_map"]
    assert all(d.max_error / d.relative_error > 1 for d in maps)  # the largest value
    assert all(d.relative_error < 1e-4 for d in maps)


def test_a_tampered_file_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, copied)
    with (copied / "onnx/mfm.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=r"mfm.onnx was changed after it was written.*m3ad-export bundle"):
        Bundle.open(copied)


def test_a_stale_contract_version_is_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "contract_version": 0}))
    with pytest.raises(
        ArtifactError, match=f"contract version 0, this m3ad reads version {CONTRACT_VERSION}"
    ):
        Bundle.open(copied)


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"has no manifest.json"):
        Bundle.open(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo.txt").write_text("mine")
    with (
        pytest.raises(ArtifactError, match=r"has no manifest.json"),
        new_folder(tmp_path / "foreign", "m3ad-bundle"),
    ):
        pass
    assert (tmp_path / "foreign" / "photo.txt").read_text() == "mine"


def test_nobody_sees_half_a_folder(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "b", "m3ad-bundle") as folder:
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_shape_is_refused_before_any_runtime(tiny_bundle: Bundle) -> None:
    inspector = Inspector(tiny_bundle)
    arrays = model_arrays(make_input(2000))
    arrays["points"] = arrays["points"].astype(np.float64)
    with pytest.raises(ValueError, match=r"`points` is float64 \[2000, 3\], expected float32 \[N, 3\]"):
        inspector.pipeline.run(arrays)
