"""BTF, small, from a bank of good parts to a real server: histograms made as a frame is prepared, one bank, one map."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.serving import ServingRecord
from m3ad_calibrate.record import read_record, record
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense, runner
from m3ad_export.engine import build_engines
from m3ad_export.heads.bank import Bank
from m3ad_export.heads.btf import CellBank, LevelRows
from m3ad_export.methods.btf import BtfSettings
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.saved import load_detector
from m3ad_export.training import Encoders
from m3ad_export.weights import SOURCES, _is_file_of, load_teacher
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from scipy.spatial.distance import cdist
from tiny import Trained, trained_on_images

TINY = WideResNetConfig(name="tiny", stem=4, inner=4, blocks=(1, 1, 1))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    teacher, weights = load_teacher(TINY, None)
    encoders = Encoders(teacher=teacher, teacher_weights=weights)
    return trained_on_images(tmp_path_factory.mktemp("btf"), "btf", encoders, BtfSettings(bank_fraction=0.02))


def test_the_bundle_has_the_published_form_and_its_threshold(trained: Trained) -> None:
    bundle, detector = trained.bundle, load_detector(trained.folder)
    assert [t.name for t in bundle.contract.inputs] == ["image", "fpfh"]
    assert bundle.manifest.score_maps == ["rgb", "xyz"]
    assert ServingRecord.of(bundle, "chain").weights == "teacher tiny (random weights)"
    inspector, served = Inspector(bundle), runner("dense", trained.folder, 1, "cpu")
    scores = []
    for sample in find_samples(trained.data, "validation"):
        prepared = prepare(read_sample(sample), bundle.preprocessing)
        assert prepared.fpfh is not None
        with torch.inference_mode():
            tensors = map(torch.from_numpy, (prepared.image, prepared.fpfh, prepared.point_pixel))
            expected = dense(detector)(*tensors).numpy()
        np.testing.assert_allclose(served.run(prepared)[0], expected, atol=1e-6 * expected.max())
        found = inspector.inspect_prepared(prepared, with_maps=True)
        np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4 * expected.max())
        assert found.score_maps is not None
        rgb, xyz = found.score_maps
        assert (rgb <= found.anomaly_map * 1.001).all()
        assert xyz.max() > rgb.max()  # as published, nothing weighs the image against the histograms
        scores.append(found.score)
    assert max(scores) == pytest.approx(detector.record["threshold"]["value"], rel=1e-3)


def test_the_bank_scores_as_the_published_formula() -> None:
    """PatchCore's weight in float64, from distances that SciPy takes."""
    rng = np.random.default_rng(4)
    rows, rgb, histograms = rng.random((40, 57)), rng.random((784, 24)), 3 * rng.random((784, 33))
    bank = Bank(torch.from_numpy(rows).float())
    bank.find_neighbors()
    tensors = (torch.from_numpy(x).float() for x in (rgb, histograms))
    distance, by_rgb, by_xyz, score = (x.numpy() for x in CellBank(bank, 24)(*tensors))
    queries = np.concatenate([rgb, histograms], axis=1)
    all_distances = cdist(queries, rows)
    np.testing.assert_allclose(distance, all_distances.min(axis=1), rtol=1e-5)
    np.testing.assert_allclose(by_rgb**2 + by_xyz**2, distance**2, rtol=1e-4)
    worst = all_distances.min(axis=1).argmax()
    nearest = all_distances[worst].argmin()
    np.testing.assert_allclose(
        by_xyz[worst], np.linalg.norm(queries[worst, 24:] - rows[nearest, 24:]), rtol=1e-4
    )
    around = np.argsort(cdist(rows[nearest : nearest + 1], rows)[0])[1:3]
    root, s = np.sqrt(57), all_distances[worst].min()
    weight = 1 - np.exp(s / root) / np.exp(all_distances[worst, around] / root).sum()
    assert float(score[0]) == pytest.approx(weight * s, rel=1e-4)


def test_levels_are_pooled_as_published() -> None:
    teacher, _ = load_teacher(TINY, None, seed=2)
    image = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        rows = LevelRows(teacher)(image)
        pool = torch.nn.Sequential(torch.nn.AvgPool2d(3, stride=1), torch.nn.AdaptiveAvgPool2d(28))
        expected = torch.cat([pool(level) for level in teacher(image)[1:]], dim=1).flatten(2)[0].T
    assert rows.shape == (784, 48)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-5)


def test_the_two_published_files_of_the_image_network_are_told_apart(tmp_path: Path) -> None:
    """They have the same names; each carries the first digits of its sha256 in its own."""
    network, _ = load_teacher(TINY, None)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    _, info = load_teacher(TINY, tmp_path / "mine.pth")
    assert (info.name, info.kind) == ("mine.pth", "pretrained")
    assert not any(_is_file_of(SOURCES[f"wide-resnet50-2-{kind}"], info.sha256) for kind in ("v1", "racm"))
    assert _is_file_of(SOURCES["wide-resnet50-2-racm"], "8234f177" + 56 * "0")
    assert not _is_file_of(SOURCES["wide-resnet50-2-v1"], "8234f177" + 56 * "0")


def test_engines_hold_whole_stages(trained: Trained) -> None:
    bundle = trained.bundle
    folder = build_engines(bundle, "sm89", "fp16")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {"rgb_rows.plan", "bank.plan", "vote.plan"}
    assert files["bank.plan"]["precision_histogram"].keys() == {"FLOAT"}
    record(bundle, trained.data, megabytes=60)
    assert read_record(bundle).keys() == {"rgb_rows"}


def test_a_server_and_the_client_give_what_the_process_gives(trained: Trained, tmp_path: Path) -> None:
    write_repository(trained.bundle.path, tmp_path / "repository", "onnxruntime")
    samples = find_samples(trained.data, "test")
    here = Inspector(trained.bundle)
    with (
        LocalServer([tmp_path / "repository"]) as server,
        TritonInspector(server.grpc_url, "tiny") as there,
    ):
        frame = read_sample(samples[0])
        found, expected = (i.inspect(frame, with_maps=True) for i in (there, here))
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
        np.testing.assert_array_equal(found.score_maps, expected.score_maps)
        assert (found.score, found.is_anomalous) == (expected.score, expected.is_anomalous)
        whole = there.inspect_frame(frame)
        assert (whole.score, whole.defects) == (expected.score, expected.defects)
        np.testing.assert_array_equal(whole.anomaly_map, expected.anomaly_map)
    document = evaluate_samples(here, samples, with_maps=True)
    assert document["score_maps"].keys() == {"rgb", "xyz"}
