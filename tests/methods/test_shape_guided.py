"""Shape-Guided, small, from training to a real server: patches of few points, a narrow image network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.serving import ServingRecord
from m3ad_calibrate.gate import gate
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import read_record, record
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense, runner
from m3ad_export.engine import build_engines
from m3ad_export.graphs.plan import default_plan
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.saved import load_detector
from m3ad_export.train.sdf import ShapeGuidedSettings
from m3ad_export.training import Encoders
from m3ad_export.weights import load_teacher
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from tiny import Trained, trained_on_images

TINY = WideResNetConfig(name="tiny", stem=4, inner=16, blocks=(1, 1, 1))
SHORT = ShapeGuidedSettings(steps=2, batch=4, patches=12, checkpoint_steps=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    teacher, weights = load_teacher(TINY, None)
    encoders = Encoders(teacher=teacher, teacher_weights=weights)
    return trained_on_images(tmp_path_factory.mktemp("sg"), "shape_guided", encoders, SHORT)


def assert_but_for_choices(found: np.ndarray, expected: np.ndarray) -> None:
    """Two rows of a memory that are nearly as near may change places: a few cells, by little."""
    error = np.abs(found - expected) / np.abs(expected).max()
    assert (error > 1e-4).mean() < 0.1
    assert error.max() < 0.02


def test_the_bundle_has_the_published_form_and_its_threshold(trained: Trained) -> None:
    bundle, detector = trained.bundle, load_detector(trained.folder)
    assert (bundle.manifest.dims.groups, bundle.manifest.dims.group_size) == (12, 500)
    assert [t.name for t in bundle.contract.inputs] == ["image", "points", "point_pixel"]
    assert ServingRecord.of(bundle, "chain").weights == "teacher tiny (random weights)"
    inspector = Inspector(bundle)
    served = runner("dense", trained.folder, 1, "cpu")
    scores = []
    for sample in find_samples(trained.data, "validation"):
        prepared = prepare(read_sample(sample), bundle.preprocessing)
        with torch.inference_mode():
            tensors = map(torch.from_numpy, (prepared.image, prepared.points, prepared.point_pixel))
            expected = dense(detector)(*tensors).numpy()
        np.testing.assert_allclose(served.run(prepared)[0], expected, atol=1e-6 * np.abs(expected).max())
        found = inspector.inspect_prepared(prepared, with_maps=True)
        assert found.score_maps is not None
        assert found.score_maps.shape == (2, 224, 224)
        assert_but_for_choices(found.anomaly_map, expected)
        scores.append(found.score)
    assert max(scores) == pytest.approx(detector.record["threshold"]["value"], rel=1e-3)


@pytest.mark.slow
def test_engines_build_for_every_stage_and_the_server_gives_what_the_process_gives(
    trained: Trained, tmp_path: Path
) -> None:
    bundle = trained.bundle
    plans = {path.stem for path in build_engines(bundle, "sm89", "fp16").glob("*.plan")}
    assert plans == {step.stage for step in bundle.contract.steps("chain")}
    (sample, *_) = find_samples(trained.data, "test")
    frame = read_sample(sample)
    write_repository(bundle.path, tmp_path / "repository", "onnxruntime")
    with (
        LocalServer([tmp_path / "repository"]) as server,
        TritonInspector(server.grpc_url, "tiny") as inspector,
    ):
        found = inspector.inspect(frame, with_maps=True)
    here = Inspector(bundle).inspect(frame, with_maps=True)
    np.testing.assert_array_equal(found.anomaly_map, here.anomaly_map)
    np.testing.assert_array_equal(found.score_maps, here.score_maps)
    assert (found.score, found.is_anomalous) == (here.score, here.is_anomalous)


@pytest.mark.slow
def test_int8_is_written_and_gated(trained: Trained, tmp_path: Path) -> None:
    """The image network and those of signed distances; which rows rebuild what stays in fp32."""
    record(trained.bundle, trained.data, megabytes=60)
    feeds = read_record(trained.bundle)
    assert feeds.keys() == {"rgb_rows", "sdf_encoder", "sdf_decoder"}
    written = quantize(trained.bundle, tmp_path / "int8", default_plan("int8"), feeds, Settings(), None)
    products = written.document["precision"]["products"]
    assert {products["sdf_encoder"]["INT8"], products["sdf_decoder"]["INT8"]} == {5, 12}
    assert products["rgb_rows"] == {"INT8": 8, "FLOAT": 5}  # its stem and the means over cells stay
    assert "dictionary" not in products
    found = gate(written, trained.bundle, find_samples(trained.data, "test"), budget=1.0)
    assert found["figures"]["chain"]["rank_correlation"]["lowest"] > 0.97
