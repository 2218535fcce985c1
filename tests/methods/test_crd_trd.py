"""CRD and TRD, small, from training to a real server: images instead of points, 256 x 256, stretched."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from m3ad.errors import ArtifactError, M3adError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.serving import ServingRecord
from m3ad_calibrate.gate import gate
from m3ad_calibrate.lattice_probe import verify_source
from m3ad_calibrate.quantize import Settings, quantize
from m3ad_calibrate.record import read_record, record
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.infer import inspect_samples
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense
from m3ad_export.checkpoints import State
from m3ad_export.engine import build_engines
from m3ad_export.graphs.plan import default_plan
from m3ad_export.heads.crd import Student, new_student, raw_map
from m3ad_export.methods.crd import load_official, parts_of
from m3ad_export.nets.configs import WideResNetConfig
from m3ad_export.official_files import require_official_encoders
from m3ad_export.saved import load_detector
from m3ad_export.train.crd import CrdSettings, levels_of, train_students
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.training import Encoders, refit
from m3ad_export.weights import WeightsInfo, load_teacher
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from PIL import Image
from tiny import Trained, trained_on_images

TINY = WideResNetConfig(name="tiny", stem=4, inner=4, blocks=(1, 1, 1))
SHORT = CrdSettings(steps=3, batch=2, checkpoint_steps=1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """TRD, whose preprocessing is CRD's and more."""
    teacher, weights = load_teacher(TINY, None)
    encoders = Encoders(teacher=teacher, teacher_weights=weights)
    return trained_on_images(tmp_path_factory.mktemp("crd"), "trd", encoders, SHORT)


def test_the_bundle_has_the_published_form_and_its_threshold(trained: Trained) -> None:
    bundle, detector = trained.bundle, load_detector(trained.folder)
    assert bundle.preprocessing.geometry == "normals"
    assert bundle.manifest.dims.rgb_width == TINY.channels[0]
    assert [t.name for t in bundle.contract.inputs] == ["image", "depth_image"]
    assert ServingRecord.of(bundle, "chain").weights == "teacher tiny (random weights)"
    inspector = Inspector(bundle)
    scores = []
    for sample in find_samples(trained.data, "validation"):
        prepared = prepare(read_sample(sample), bundle.preprocessing)
        assert prepared.depth_image is not None
        with torch.inference_mode():
            expected = dense(detector)(
                torch.from_numpy(prepared.image), torch.from_numpy(prepared.depth_image), torch.zeros(0)
            ).numpy()
        found = inspector.inspect_prepared(prepared, with_maps=True)
        assert found.score_maps is not None
        np.testing.assert_allclose(found.anomaly_map, expected, atol=2e-4 * np.abs(expected).max())
        np.testing.assert_allclose(found.score_maps.sum(axis=0), found.anomaly_map, atol=1e-4)
        scores.append(found.score)
    assert max(scores) == pytest.approx(detector.record["threshold"]["value"], rel=1e-3)


def test_the_maps_of_validation_frames_have_mean_zero_and_std_one(trained: Trained, tmp_path: Path) -> None:
    detector = load_detector(trained.folder)
    teacher, students, vote = parts_of(detector)
    extract = FeatureExtractor(None, None, trained.bundle.preprocessing, tmp_path)
    for own, student in enumerate(students.values()):
        maps = []
        for sample in find_samples(trained.data, "validation"):
            x, y = levels_of(teacher, [extract(sample)], own)
            maps.append(((raw_map(x, student(*x, *y)) - vote.mean[own]) / vote.std[own]).detach())
        pooled = torch.cat(maps).double()
        assert abs(float(pooled.mean())) < 1e-3
        assert float(pooled.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_run_that_was_interrupted_ends_with_the_same_students(trained: Trained, tmp_path: Path) -> None:
    samples = find_samples(trained.data, "train")
    extract = FeatureExtractor(None, None, Preprocessing(geometry="depth"), tmp_path / "features")
    teacher, _ = load_teacher(TINY, None)
    runs: list[dict[str, Student]] = [
        {"rgb_student": new_student(TINY, 1), "depth_student": new_student(TINY, 2)} for _ in range(3)
    ]
    expected = train_students(samples, extract, teacher, runs[0], tmp_path / "whole", SHORT)
    assert all(each[-1] < each[0] and len(each) == SHORT.steps for each in expected.values())
    train_students(
        samples, extract, teacher, runs[1], tmp_path / "again", SHORT, lambda steps, _d, _t: list(steps)[:2]
    )
    assert train_students(samples, extract, teacher, runs[2], tmp_path / "again", SHORT) == expected
    for name, student in runs[0].items():
        for key, value in student.state_dict().items():
            assert torch.equal(value, runs[2][name].state_dict()[key]), f"{name}.{key}"


def test_other_good_frames_change_the_scale_alone(trained: Trained, tmp_path: Path) -> None:
    before = load_detector(trained.folder)
    good = [s for s in find_samples(trained.data, "test") if s.is_good]
    after = refit(before, good, good, tmp_path)
    assert not torch.equal(after.networks["vote"].mean, before.networks["vote"].mean)
    assert after.networks["rgb_student"] is before.networks["rgb_student"]


def test_engines_hold_whole_stages_and_half_precision_is_gated(trained: Trained, tmp_path: Path) -> None:
    bundle = trained.bundle
    folder = build_engines(bundle, "sm89", "fp16")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {f"{s}.plan" for s in ("teacher", "rgb_student", "depth_student", "vote")}
    for name in ("teacher", "rgb_student", "depth_student"):
        ops = {node.op_type for node in onnx.load(bundle.path / "onnx" / f"{name}.onnx").graph.node}
        assert "BatchNormalization" not in ops
        assert "Conv" in ops
    record(bundle, trained.data, megabytes=60)
    assert read_record(bundle).keys() == {"teacher", "rgb_student", "depth_student"}
    written = quantize(bundle, tmp_path / "fp16", default_plan("fp16"), {}, Settings(), None)
    found = gate(written, bundle, find_samples(trained.data, "test"), budget=1.0)
    assert found["figures"]["chain"]["rank_correlation"]["lowest"] > 0.9


def test_no_lattice_is_for_it(trained: Trained) -> None:
    with pytest.raises(
        ArtifactError,
        match=r"TRD scores every pixel, no lattice is for it; find a precision plan alone: m3ad-calibrate",
    ):
        verify_source(trained.bundle)


def test_a_layout_that_the_method_lacks_is_not_to_be_exported(trained: Trained) -> None:
    with pytest.raises(
        ArtifactError, match="has no layout fused, only chain; TRD has no other, so leave --layout out"
    ):
        trained.bundle.layout("fused")


def test_a_server_and_the_client_give_what_the_process_gives(trained: Trained, tmp_path: Path) -> None:
    write_repository(trained.bundle.path, tmp_path / "repository", "onnxruntime")
    samples = find_samples(trained.data, "test")
    here = Inspector(trained.bundle)
    with (
        LocalServer([tmp_path / "repository"]) as server,
        TritonInspector(server.grpc_url, "tiny") as there,
    ):
        for sample in samples[:2]:
            frame = read_sample(sample)
            found, expected = (i.inspect(frame, with_maps=True) for i in (there, here))
            assert found.anomaly_map.shape == (256, 256)
            np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
            np.testing.assert_array_equal(found.score_maps, expected.score_maps)
            assert (found.score, found.is_anomalous) == (expected.score, expected.is_anomalous)
            whole = there.inspect_frame(frame)
            assert (whole.score, whole.defects) == (expected.score, expected.defects)
            np.testing.assert_array_equal(whole.anomaly_map, expected.anomaly_map)
    document = evaluate_samples(here, samples, with_maps=True)
    assert document["score_maps"].keys() == {"rgb_error", "depth_error"}
    (told, *_) = inspect_samples(here, samples[:1], tmp_path / "out")
    frame = read_sample(samples[0])
    assert told.error is None
    assert Image.open(told.overlay).size[0] >= frame.rgb.shape[1]


def test_official_files_load_strictly_and_others_say_why(tmp_path: Path) -> None:
    (tmp_path / "rope").mkdir()
    path = tmp_path / "rope" / "ckp.pth"
    states: dict[str, State] = {"student_rgb": new_student(TINY, 1).state_dict()}
    states["student_normals"] = new_student(TINY, 2).state_dict()
    torch.save(states, path)
    students, infos = load_official(tmp_path, "rope", TINY)
    assert torch.equal(students["depth_student"].decoder.w_a, states["student_normals"]["decoder.w_a"])
    assert infos["depth_student"].note == "student_normals"
    assert infos["rgb_student"].licence == "none: all rights reserved"

    odd = dict(states["student_rgb"])
    odd["decoder.w_d"] = odd.pop("decoder.w_c")
    for broken, message in (
        ({"student_rgb": states["student_rgb"]}, "holds student_rgb, expected student_rgb and student_depth"),
        ({"state_dict": states["student_rgb"]}, r"holds state_dict, expected student_rgb"),
        (
            {**states, "student_rgb": odd},
            r"is not a checkpoint of Student .*: it lacks 1 \(decoder.w_c\); it has unknown 1 \(decoder.w_d\)",
        ),
    ):
        torch.save(broken, path)
        with pytest.raises(ArtifactError, match=message):
            load_official(tmp_path, "rope", TINY)
    random = WeightsInfo(name="r", kind="random", sha256="0" * 64, licence="none")
    with pytest.raises(
        M3adError, match=r"rebuild what torchvision's wide_resnet50_2 sees, not .* random weights"
    ):
        require_official_encoders(None, None, None, None, random)


def test_torchvisions_file_loads_strictly(tmp_path: Path) -> None:
    network, _ = load_teacher(TINY, None, seed=3)
    rest = {"layer4.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    torch.save({**network.state_dict(), **rest}, tmp_path / "file.pth")
    loaded, info = load_teacher(TINY, tmp_path / "file.pth")
    assert info.kind == "pretrained"
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in network.state_dict().items())
    state = {k: v for k, v in network.state_dict().items() if k != "layer3.0.bn2.running_mean"}
    torch.save({**state, "layer5.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(
        ArtifactError, match=r"lacks 1 \(layer3.0.bn2.running_mean\); it has unknown 1 \(layer5.weight\)"
    ):
        load_teacher(TINY, tmp_path / "file.pth")


def test_the_published_schedule_is_the_default() -> None:
    assert CrdSettings() == replace(CrdSettings(), epochs=200, batch=16, lr=5e-3, seed=42, steps=0)
