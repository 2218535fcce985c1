"""The native library: built at first use, never used when stale, missed with one clear warning."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from m3ad.errors import M3adError, MissingDependencyError
from m3ad_plugins import build, native, ops
from m3ad_plugins.farthest_point_sample import reference

POINTS = np.random.default_rng(0).normal(0, 1, (300, 3)).astype(np.float32)


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for the library that holds none, known to the loader."""
    target = tmp_path / "cache" / "libm3ad_ops.so"
    monkeypatch.setattr(build, "library_paths", lambda: [target])
    native.library.cache_clear()
    yield target
    native.library.cache_clear()


def test_first_use_builds_and_replaces_a_stale_library(fresh_library: Path) -> None:
    fresh_library.parent.mkdir()
    fresh_library.write_bytes(b"a library of older sources")
    found = native.library()
    assert found is not None
    assert found._name == str(fresh_library)
    native.library.cache_clear()
    built = fresh_library.stat().st_mtime_ns
    assert native.library() is not None
    assert fresh_library.stat().st_mtime_ns == built


def test_no_compiler_warns_once_and_numpy_serves(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(
        RuntimeWarning, match=r"run in NumPy, .* slower: no C\+\+ compiler: CXX names no-such-compiler"
    ):
        idx = ops.farthest_point_sample(POINTS, 20)
    np.testing.assert_array_equal(idx, reference.farthest_point_sample(POINTS, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.knn_group(POINTS, idx, 5)


def test_missing_compiler_is_named(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        MissingDependencyError, match="CXX names no-such-compiler, which is not there; install one"
    ):
        build.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match=r"neither c\+\+ nor g\+\+ is installed"):
        build.build()


def test_compiler_that_refuses_leaves_nothing(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-std=no-such-standard"))
    with pytest.raises(M3adError, match="cannot compile the m3ad ops"):
        build.build()
    assert list(fresh_library.parent.iterdir()) == []


def test_sources_decide_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    source = package / "an_op" / "kernel.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int a;")
    monkeypatch.setattr(build, "PACKAGE", package)
    hashes = [build.source_hash()]
    source.write_text("int b;")
    hashes.append(build.source_hash())
    source.parent.rename(package / "another_op")
    hashes.append(build.source_hash())
    (package / "common").mkdir()
    (package / "common" / "tiles.hpp").write_text("")
    hashes.append(build.source_hash())
    assert None not in hashes
    assert len({*hashes}) == len(hashes)
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "gone" / "package")
    assert build.source_hash() is None
    with pytest.raises(MissingDependencyError, match="install m3ad again, its wheel has them"):
        build.build()
