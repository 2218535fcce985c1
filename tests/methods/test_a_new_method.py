"""docs/extend.md, followed: a method of two files goes from training to a real server, and no room names it."""

import subprocess
from pathlib import Path

import mean_colour
import numpy as np
import pytest
import torch
from conftest import TINY_RGB, make_input
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.methods import METHODS
from m3ad_calibrate.record import read_record, record
from m3ad_client.triton import TritonInspector
from m3ad_export.baselines.forms import dense
from m3ad_export.bundle_writer import write_bundle
from m3ad_export.engine import build_engines
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.sample_data import write_sample_data
from m3ad_export.saved import load_detector
from m3ad_export.training import Encoders, settings_of, train
from m3ad_export.weights import load_rgb_encoder
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from serving import make_frame, rehash

NAME = mean_colour.METHOD.name


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines in the dicts."""
    monkeypatch.setitem(METHODS, NAME, mean_colour.METHOD)
    monkeypatch.setitem(IMPLEMENTATIONS, NAME, mean_colour.implementation())


@pytest.mark.usefixtures("registered")
def test_two_files_are_enough(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_sample_data(data, train=2, validation=1, test_per_kind=1, size=128)
    encoder, weights = load_rgb_encoder(TINY_RGB, None)
    train(
        find_samples(data, "train"),
        find_samples(data, "validation"),
        Encoders(rgb=encoder, rgb_weights=weights),
        tmp_path / "detector",
        category="tiny",
        preprocessing=Preprocessing(),
        settings=settings_of(NAME, {"rows": "500"}),
        method=NAME,
    )
    detector = load_detector(tmp_path / "detector")
    assert detector.record["training"]["rows"] == 500
    write_bundle(detector, make_input(2000), tmp_path / "bundle", parity_points=(1024, 1025))
    bundle = Bundle.open(tmp_path / "bundle")
    frame = make_input(2000)
    with torch.inference_mode():
        tensors = [torch.from_numpy(a) for a in (frame.image, frame.points, frame.point_pixel)]
        expected = dense(detector)(*tensors).numpy()
    found = Inspector(bundle).inspect_prepared(frame).anomaly_map
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())
    (validation,) = find_samples(data, "validation")
    score = Inspector(bundle).inspect(read_sample(validation)).score
    assert score == pytest.approx(detector.record["threshold"]["value"], rel=1e-5)

    assert {p.name for p in build_engines(bundle, "sm89", "fp16").glob("*.plan")} == {
        "rgb_extractor.plan",
        "project.plan",
        "distance.plan",
    }
    record(bundle, data, megabytes=20)
    assert read_record(bundle).keys() == {"rgb_extractor"}

    # The server's stages run in processes of their own, which must know the method too.
    write_repository(bundle.path, tmp_path / "repository", "onnxruntime")
    known = Path(mean_colour.__file__).parent
    for model in (tmp_path / "repository").glob("*/1/model.py"):
        told = f"import sys\n\nsys.path.insert(0, {str(known)!r})\nimport mean_colour\n\nmean_colour.register()\n"
        model.write_text(told + model.read_text())
    rehash(tmp_path / "repository")
    part = make_frame()
    with (
        LocalServer([tmp_path / "repository"]) as server,
        TritonInspector(server.grpc_url, "tiny") as inspector,
    ):
        served = inspector.inspect(part)
    here = Inspector(bundle).inspect(part)
    np.testing.assert_array_equal(served.anomaly_map, here.anomaly_map)
    assert (served.score, served.is_anomalous) == (here.score, here.is_anomalous)


def test_a_bundle_of_an_unknown_method_says_which_are_known(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"unknown method 'mean_colour', expected one of mentor3ad, cfm"):
        Bundle.of_document(tiny_bundle.path, {**tiny_bundle.document, "method": NAME})


def test_no_room_names_a_method_outside_its_declaration() -> None:
    """The declarations, the implementations and what is built for one of them alone; everything else is generic."""
    root = Path(__file__).parents[2]
    words = ("mentor3ad", "cmdr_iad", '"crd"', '"trd"', '"ast"', '"cfm"', '"mfm"', '"mgm"')
    allowed = {
        "core/m3ad/methods/__init__.py",
        "core/m3ad/methods/mentor3ad.py",
        "core/m3ad/methods/cfm.py",
        "core/m3ad/methods/cmdr_iad.py",
        "core/m3ad/methods/crd.py",
        "core/m3ad/methods/ast.py",
        "export/m3ad_export/methods/__init__.py",
        "export/m3ad_export/methods/mentor3ad.py",
        "export/m3ad_export/methods/cfm.py",
        "export/m3ad_export/methods/cmdr_iad.py",
        # CMDR-IAD's own networks, which take its window from the declaration
        "export/m3ad_export/heads/cmdr.py",
        "export/m3ad_export/heads/cmdr_rewrites.py",
        "export/m3ad_export/heads/macs.py",
        "export/m3ad_export/train/cmdr.py",
        "export/m3ad_export/heads/map_head.py",  # image_norm: `cfm`
        "export/m3ad_export/baselines/forms.py",  # `bench --baseline cfm`
        "export/m3ad_export/baselines/graphed.py",  # the frame that a GPU is measured with
        "client/m3ad_client/bench_command.py",  # its name
        "client/m3ad_client/measure.py",  # the form that the paper's table is beside
        "export/m3ad_export/weights.py",  # where published weights come from
    }
    listed = subprocess.run(
        ["git", "ls-files", "core", "export", "calibrate", "client", "triton_repo"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    naming = {
        path
        for path in listed
        if path.endswith(".py") and any(word in (root / path).read_text() for word in words)
    }
    assert naming <= allowed, naming - allowed
