import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from m3ad.bundle import Bundle, sha256_of
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad_calibrate.record import FOLDER, read_record, record
from m3ad_export.graphs.head import CPU_TILE_ROWS
from m3ad_export.sample_data import write_sample_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "category"
    write_sample_data(folder, train=3, validation=2, test_per_kind=1, size=128)
    return folder


@pytest.fixture
def bundle(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_frames_are_sampled_by_their_pixels(bundle: Bundle, data: Path, sampled_by: list[np.ndarray]) -> None:
    record(bundle, data, megabytes=40)
    samples = find_samples(data, "train")
    # The first frame runs once more, to see what a run weighs.
    for sample, used in zip([samples[0], *samples], sampled_by, strict=True):
        np.testing.assert_array_equal(used, prepare(read_sample(sample), bundle.preprocessing).point_pixel)


def test_what_is_recorded_is_what_the_stages_read(bundle: Bundle, data: Path) -> None:
    folder = record(bundle, data, megabytes=40)
    feeds = read_record(bundle)
    samples = find_samples(data, "train")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [s["name"] for s in manifest["samples"]] == [f"good/{s.name}" for s in samples]
    assert [s["rgb_sha256"] for s in manifest["samples"]] == [sha256_of(s.rgb_path) for s in samples]
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".npy", ".json"}
    preprocessing = bundle.preprocessing
    first = prepare(read_sample(samples[0]), preprocessing)
    np.testing.assert_array_equal(feeds["rgb_extractor"][0]["image"], first.image)
    session = ort.InferenceSession(str(bundle.file("onnx/rgb_extractor.onnx")))
    np.testing.assert_allclose(
        feeds["head_tokens"][0]["rgb_tokens"], session.run(None, {"image": first.image})[0], atol=1e-5
    )
    # mfm is used twice: its second run reads what mgm made of the first one.
    once, again = feeds["mfm"]
    mgm = ort.InferenceSession(str(bundle.file("onnx/mgm.onnx")))
    inputs = {name: np.ascontiguousarray(value) for name, value in feeds["mgm"][0].items()}
    rgb, xyz = mgm.run(["rgb_reconstructed", "xyz_reconstructed"], inputs)
    np.testing.assert_array_equal(once["rgb_features"], inputs["rgb_features"])
    np.testing.assert_allclose(again["rgb_features"], rgb, atol=1e-4)
    np.testing.assert_allclose(again["xyz_features"], xyz, atol=1e-4)
    rows = ort.InferenceSession(str(bundle.file("onnx/head_rows.onnx")))
    for run in feeds["head_rows"]:
        assert [run[v.name].shape for v in rows.get_inputs()] == [
            (CPU_TILE_ROWS, v.shape[1]) for v in rows.get_inputs()
        ]
    Bundle.open(bundle.path)  # a record is no tampering


@pytest.mark.parametrize("megabytes", [12, 40])
def test_the_budget_of_disk_is_kept(bundle: Bundle, data: Path, megabytes: int) -> None:
    folder = record(bundle, data, megabytes=megabytes)
    size = sum(p.stat().st_size for p in folder.rglob("*.npy"))
    assert 0.1 < size / (megabytes * 1e6) <= 1


def test_recording_twice_gives_the_same_files(bundle: Bundle, data: Path) -> None:
    first = json.loads((record(bundle, data, 20) / "manifest.json").read_text())
    assert json.loads((record(bundle, data, 20) / "manifest.json").read_text()) == first


def test_a_budget_that_holds_nothing_says_what_would(bundle: Bundle, data: Path) -> None:
    with pytest.raises(M3adError, match=r"1 MB do not hold one frame .* ask for --megabytes \d+ or more"):
        record(bundle, data, megabytes=1)
    assert not (bundle.path / FOLDER).exists()


def test_test_frames_are_refused(bundle: Bundle, data: Path) -> None:
    with pytest.raises(M3adError, match="calibration frames come from train or validation, got 'test'"):
        record(bundle, data, split="test")


def test_a_split_without_frames_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="has no split 'train'"):
        record(bundle, tmp_path / "empty")


def test_a_changed_record_or_another_graph_is_refused(bundle: Bundle, data: Path) -> None:
    folder = record(bundle, data, megabytes=12)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "onnx": {}}))
    with pytest.raises(ArtifactError, match=r"was recorded with other graphs .* m3ad-calibrate record"):
        read_record(bundle)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "rgb_extractor" / "image.npy", np.zeros(3, np.float32))
    with pytest.raises(ArtifactError, match=r"image.npy was changed after it was written"):
        read_record(bundle)


def test_without_a_record_the_command_is_named(bundle: Bundle) -> None:
    with pytest.raises(ArtifactError, match=r"is not a folder. Record again: m3ad-calibrate record"):
        read_record(bundle)
