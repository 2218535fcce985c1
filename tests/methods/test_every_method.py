"""Each method through every command's work: dense form, layouts, training's scores, engines, INT8, server."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_input
from gpu_engines import double_of, installed, with_engines
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.methods import METHODS
from m3ad.preprocess import ModelInput, prepare
from m3ad.scored import on_lattice
from m3ad.serving import ServingRecord
from m3ad_calibrate.gate import gate
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import read_record, record
from m3ad_calibrate.svm import config_of
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.detector import Detector
from m3ad_export.engine import build_engines
from m3ad_export.graphs.plan import default_plan
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.sample_data import write_sample_data
from m3ad_export.saved import load_detector, save_detector
from m3ad_export.train.features import FeatureExtractor
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from serving import make_frame
from tiny import OTHERS, make_detector

every = pytest.mark.parametrize("method", OTHERS)


@pytest.fixture(scope="session")
def detectors() -> dict[str, Detector]:
    return {method: make_detector(method) for method in OTHERS}


@pytest.fixture(scope="session")
def bundles(detectors: dict[str, Detector], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Exported for real: writing a bundle proves its parity with PyTorch, every layout at two sizes of cloud."""
    folder: Path = tmp_path_factory.mktemp("methods")
    for method, detector in detectors.items():
        write_bundle(detector, make_input(3000), folder / method, parity_points=(1024, 1025))
    return {method: Bundle.open(folder / method) for method in detectors}


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """CFM that scores every other pixel."""
    path = tmp_path_factory.mktemp("lattice") / "cfm_half"
    write_bundle(make_detector("cfm", "half"), make_input(3000), path, parity_points=(1025,))
    return Bundle.open(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "category"
    write_sample_data(folder, train=2, validation=1, test_per_kind=1, size=128)
    return folder


@every
def test_every_layout_has_the_map_of_the_dense_form(
    method: str, detectors: dict[str, Detector], bundles: dict[str, Bundle]
) -> None:
    frame = make_input(2000)
    tensors = [torch.from_numpy(a) for a in (frame.image, frame.points, frame.point_pixel)]
    with torch.inference_mode():
        expected = dense(detectors[method])(*tensors).numpy()
    bundle = bundles[method]
    assert bundle.manifest.layouts == list(METHODS[method].layouts)
    for layout in bundle.manifest.layouts:
        found = Inspector(bundle, layout).inspect_prepared(frame, with_maps=True)
        # CFM's own interpolation takes distances as |a|^2 + |b|^2 - 2ab, as published.
        tolerance = 1e-4 if method == "cfm" else 1e-5
        np.testing.assert_allclose(found.anomaly_map, expected, atol=tolerance * np.abs(expected).max())
        if not method.startswith("m3dm"):  # whose score is of the worst feature, not of its map
            assert found.score == found.anomaly_map.max()
        assert found.score_maps is not None
        assert len(found.score_maps) == len(bundle.manifest.score_maps)


def assert_engines_agree(source: Bundle, frame: ModelInput, folder: Path) -> None:
    """Of the fused layout with its head in parts, where rows that the head is given are read at their place."""
    bundle = with_engines(source, folder, ["tensorrt_rtx"], ("fused",))
    expected = Inspector(bundle).inspect_prepared(frame, with_maps=True)
    with installed(double_of("tensorrt_rtx"), folder / "library") as double:
        with Inspector(bundle, runtime="tensorrt_rtx") as inspector:
            found = inspector.inspect_prepared(frame, with_maps=True)
        double.assert_given_back()
    scale = np.abs(expected.anomaly_map).max()
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4 * scale)
    assert found.score == pytest.approx(expected.score, rel=1e-4)


@pytest.mark.parametrize("method", ["cfm", "cmdr_iad"])
def test_engines_in_process_give_the_same_map(
    method: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """Tiles of the head's rows, of which the last is not full."""
    assert_engines_agree(bundles[method], make_input(5000), tmp_path)


def test_engines_take_few_rows_of_a_lattice(half: Bundle, tmp_path: Path) -> None:
    frame = make_input(1024)
    few = on_lattice(frame.scored_pixel, "half")[:600]
    assert_engines_agree(half, frame._replace(scored_pixel=few), tmp_path)


@every
def test_the_threshold_is_found_on_the_scores_that_the_bundle_gives(
    method: str, detectors: dict[str, Detector], bundles: dict[str, Bundle], data: Path, tmp_path: Path
) -> None:
    detector = detectors[method]
    (sample,) = find_samples(data, "validation")
    extract = FeatureExtractor(detector.rgb, detector.xyz, Preprocessing(), tmp_path)
    anomaly_map, score = IMPLEMENTATIONS[method].predictor(detector)(extract(sample))
    expected = Inspector(bundles[method]).inspect(read_sample(sample))
    scale = np.abs(expected.anomaly_map).max()
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map, atol=1e-5 * scale)
    assert float(score) == pytest.approx(expected.score, rel=1e-5)


@every
def test_a_saved_detector_is_the_same(method: str, detectors: dict[str, Detector], tmp_path: Path) -> None:
    save_detector(detectors[method], tmp_path)
    loaded = load_detector(tmp_path)
    assert loaded.record == json.loads(json.dumps(detectors[method].record))
    for name, module in detectors[method].modules().items():
        state = loaded.modules()[name].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@every
def test_a_bundle_holds_the_graphs_of_its_method_and_no_other(
    method: str, bundles: dict[str, Bundle]
) -> None:
    bundle, declared = bundles[method], METHODS[method]
    stages = {use.stage for uses in declared.layouts.values() for use in uses}
    expected = {f"onnx/{stage}.onnx" for stage in stages}
    expected |= {f"onnx/{graph.name}.onnx" for graph in declared.graphs}
    expected |= {f"onnx/{file}" for stage in stages for file in declared.cpu[stage].files}
    assert {file for file in bundle.manifest.files if file.startswith("onnx/")} == expected
    assert list(bundle.manifest.encoders) == [
        side for side, name in (("rgb", "image"), ("xyz", "points")) if name in declared.inputs
    ]


@every
def test_engines_build_for_every_stage(method: str, bundles: dict[str, Bundle]) -> None:
    bundle = bundles[method]
    folder = build_engines(bundle, "sm89", "fp16", bundle.manifest.layouts)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    stages = {step.stage for layout in bundle.manifest.layouts for step in bundle.contract.steps(layout)}
    parts = {"head_tokens", "head_rows", "head_scores", "head_vote"} if "head" in stages else set()
    assert files.keys() == {f"{name}.plan" for name in (stages - {"head"}) | parts}
    if "bank" in stages:  # distances in half precision would choose other rows
        assert files["bank.plan"]["precision_histogram"].keys() == {"FLOAT"}


@pytest.mark.parametrize("method", ["cfm", "cmdr_iad"])
def test_int8_is_written_and_gated(
    method: str, bundles: dict[str, Bundle], data: Path, tmp_path: Path
) -> None:
    source = bundles[method]
    record(source, data, megabytes=60)
    feeds = read_record(source)
    quantizable = {g.name for g in source.contract.method.graphs if g.may_quantize and g.axis != "map"}
    assert feeds.keys() == quantizable
    written = quantize(source, tmp_path / "int8", default_plan("int8"), feeds, Settings(), None)
    histograms = written.document["precision"]["products"]
    assert all(histograms[name].get("INT8") for name in quantizable)
    found = gate(written, source, find_samples(data, "test"), budget=1.0)
    for layout in source.manifest.layouts:
        assert found["figures"][layout]["rank_correlation"]["lowest"] > 0.98
    changed = Inspector(written).inspect_prepared(make_input(2000)).anomaly_map
    assert (changed != Inspector(source).inspect_prepared(make_input(2000)).anomaly_map).any()


def test_half_precision_is_gated_on_a_cpu(bundles: dict[str, Bundle], data: Path, tmp_path: Path) -> None:
    """A half graph runs emulated, from a folder in which the pixel weights must lie too."""
    source = bundles["cmdr_iad"]
    written = quantize(source, tmp_path / "fp16", default_plan("fp16"), {}, Settings(), None)
    found = gate(written, source, find_samples(data, "test"), budget=1.0)
    for layout in source.manifest.layouts:
        assert found["figures"][layout]["rank_correlation"]["lowest"] > 0.99


def test_only_a_method_with_an_svm_has_one_refitted(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(
        ArtifactError, match=r"has no one-class SVM, CFM votes without one; set the threshold"
    ):
        config_of(bundles["cfm"], None)


def test_the_authors_licence_is_told_where_results_are(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["cfm"]
    official = {"to_rgb": {"name": "CFM_3Dto2D_rope_250ep_4bs.pth", "licence": "non-commercial"}}
    told = Bundle.of_document(bundle.path, {**bundle.document, "official": official})
    line = ServingRecord.of(told, "fused").weights
    assert line.endswith("to_rgb CFM_3Dto2D_rope_250ep_4bs.pth (licence: non-commercial)")
    assert line.startswith(ServingRecord.of(bundle, "fused").weights)


def test_a_detector_on_a_lattice_needs_no_gate_and_scores_nearly_the_same(
    half: Bundle, bundles: dict[str, Bundle]
) -> None:
    """Its score maps are those of all pixels but for what half of them do not say."""
    half.verify_usable()
    frame = make_input(2000)
    some = frame._replace(scored_pixel=on_lattice(frame.scored_pixel, "half"))
    for layout in half.manifest.layouts:
        full = Inspector(bundles["cfm"], layout).inspect_prepared(frame).anomaly_map.flat[frame.point_pixel]
        found = Inspector(half, layout).inspect_prepared(some).anomaly_map.flat[frame.point_pixel]
        np.testing.assert_allclose(found, full, rtol=0.05)
        assert (found != full).any()


def test_a_server_gives_what_the_process_gives(
    bundles: dict[str, Bundle], half: Bundle, tmp_path: Path
) -> None:
    bundles = {**bundles, "cfm_half": half}
    layouts = [(method, layout) for method in bundles for layout in bundles[method].manifest.layouts]
    frame = make_frame()
    for layout in ("chain", "fused"):
        served = [method for method, each in layouts if each == layout]
        repositories = []
        for method in served:
            path = tmp_path / layout / method
            write_repository(bundles[method].path, path, "onnxruntime", layout)  # type: ignore[arg-type]
            repositories.append(path)
        with LocalServer(repositories) as server:
            for method in served:
                with TritonInspector(server.grpc_url, method) as inspector:
                    assert inspector.record.method == bundles[method].manifest.method
                    found = inspector.inspect(frame, with_maps=True)
                here = Inspector(bundles[method], layout).inspect(frame, with_maps=True)  # type: ignore[arg-type]
                np.testing.assert_array_equal(found.anomaly_map, here.anomaly_map)
                np.testing.assert_array_equal(found.score_maps, here.score_maps)
                assert (found.score, found.is_anomalous) == (here.score, here.is_anomalous)


def test_a_client_sends_what_the_method_takes(bundles: dict[str, Bundle]) -> None:
    names = {method: [t.name for t in bundles[method].contract.inputs] for method in OTHERS}
    assert names["cfm"] == names["cmdr_iad"] == ["image", "points", "point_pixel", "scored_pixel"]
    assert names["cmdr_iad_rgb"] == ["image", "scored_pixel"]
    assert names["m3dm"] == names["m3dm_uff"] == ["image", "points", "point_pixel"]
    assert names["cmdr_iad_xyz"] == ["points", "point_pixel", "scored_pixel"]


@every
def test_without_a_modality_its_pixels_change_nothing(method: str, bundles: dict[str, Bundle]) -> None:
    frame = prepare(make_frame(), Preprocessing())
    first = Inspector(bundles[method]).inspect_prepared(frame).anomaly_map
    other = frame._replace(image=frame.image[:, :, ::-1].copy())
    second = Inspector(bundles[method]).inspect_prepared(other).anomaly_map
    assert np.array_equal(first, second) == (method == "cmdr_iad_xyz")
