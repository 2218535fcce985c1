"""`m3ad-plugins`: what it builds, where that is found, and what it says when something is missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from m3ad_plugins import cuda_build, library, native, self_test
from m3ad_plugins.cli import app
from m3ad_plugins.knn_group import reference
from typer.testing import CliRunner


def result(*arguments: str) -> object:
    return CliRunner().invoke(app, list(arguments))


def test_build_without_headers_stops_and_says_what_to_install(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc or no CMake here")
    done = result("build", "--tensorrt", str(tmp_path), "--out", str(tmp_path / "out"))
    if (tmp_path / "out").exists():
        pytest.skip("TensorRT's headers are installed in the system")
    assert "No TensorRT headers (NvInferRuntime.h)" in str(done.exception)
    assert "m3ad-plugins build --tensorrt" in " ".join(str(done.exception).split())
    assert list(tmp_path.iterdir()) == []


def test_build_without_cmake_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cuda_build.sys, "executable", "/nowhere/python")
    assert str(result("build").exception) == (
        "the plugins are built with CMake, which is not here: pip install cmake"
    )


def test_a_build_is_found_until_a_source_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "an_op").mkdir(parents=True)
    source = package / "an_op" / "kernel.cu"
    source.write_text("int a;")
    monkeypatch.setattr(cuda_build, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("M3AD_PLUGINS_DIR", raising=False)
    folder = cuda_build.built_folder()
    folder.mkdir(parents=True)
    (folder / library.LIBRARY).touch()
    assert library.library_path() == folder / library.LIBRARY
    source.write_text("int b;")
    assert cuda_build.built_folder() != folder


def test_self_test_finds_an_op_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(self_test, "TENSORRT_MODULES", ())
    passed = result("test")
    assert (passed.exit_code, passed.stdout[:34]) == (0, "ok   C++ ops: equal the references")
    monkeypatch.setattr(
        reference,
        "knn_group",
        lambda points, idx, size: tuple(np.roll(a, 1) for a in self_test.ops.knn_group(points, idx, size)),
    )
    failed = result("test")
    assert failed.stdout.startswith(
        "FAIL C++ ops: differ from the references in indices or normals; report it"
    )
    assert "1 of 1 checks failed" in str(failed.exception)
