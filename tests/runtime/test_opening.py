"""A bundle is verified while its stages are loaded: none before its own files are, and no answer before all are."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_input
from m3ad import bundle as artefact
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError
from m3ad_runtime import pipeline
from m3ad_runtime.pipeline import Inspector


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.mark.parametrize("relative", ["onnx/head_rows.onnx", "golden/score.npy", "onnx/mfm.onnx"])
def test_a_changed_file_is_refused_and_never_loaded(
    copied: Path, monkeypatch: pytest.MonkeyPatch, relative: str
) -> None:
    """The first is a stage's own, the others are read by none of the layout."""
    loaded: list[str] = []
    form = pipeline.cpu_stage

    def told(name: str, *arguments: Any) -> Any:
        loaded.append(name)
        return form(name, *arguments)

    monkeypatch.setattr(pipeline, "cpu_stage", told)
    (copied / relative).write_bytes(b"not what was written")
    with pytest.raises(
        ArtifactError, match=rf"{relative} was changed after it was written.*m3ad-export bundle"
    ):
        Inspector.open(copied, "fused")
    assert ("head" in loaded) == (relative != "onnx/head_rows.onnx")


def test_a_missing_file_is_refused(copied: Path) -> None:
    (copied / "onnx/rgb_extractor.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"rgb_extractor\.onnx is missing, the manifest lists it"):
        Inspector.open(copied, "fused")


def test_there_is_no_inspector_before_the_last_file_is_verified(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, opened, whole = threading.Event(), threading.Event(), artefact.sha256_of
    last = list(tiny_bundle.manifest.files)[-1]

    def waits(path: Path) -> str:
        if path == tiny_bundle.path / last:
            assert loaded.wait(30)  # every stage is loaded meanwhile
            assert not opened.is_set()
        return whole(path)

    def told(name: str, *arguments: Any) -> Any:
        found = form(name, *arguments)
        left.discard(name)
        if not left:
            loaded.set()
        return found

    form = pipeline.cpu_stage
    left = {step.stage for step in tiny_bundle.contract.steps("fused")}
    monkeypatch.setattr(artefact, "sha256_of", waits)
    monkeypatch.setattr(pipeline, "cpu_stage", told)
    inspector = Inspector.open(tiny_bundle.path, "fused")
    opened.set()
    there = Inspector(tiny_bundle, "fused").inspect_prepared(make_input(1500))
    np.testing.assert_array_equal(inspector.inspect_prepared(make_input(1500)).anomaly_map, there.anomaly_map)
