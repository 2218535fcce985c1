"""What TensorRT-RTX compiles is kept from one start to the next, through the double of a GPU."""

import stat
from pathlib import Path

import pytest
from conftest import make_input
from gpu_double import GpuDouble
from gpu_engines import double_of, installed
from m3ad.bundle import Bundle
from m3ad_runtime.pipeline import Inspector

PLANS = ["rgb_extractor", "xyz_extractor", "head_tokens", "head_rows", "head_scores", "head_vote"]


def start(bundle: Bundle, library: Path, version: str | None = None) -> list[str]:
    """Inspect a frame in a new process, so to say; return the plans whose kernels were compiled."""
    made = double_of("tensorrt_rtx") if version is None else GpuDouble(name="tensorrt_rtx", version=version)
    with installed(made, library) as double:
        with Inspector.open(bundle.path, runtime="tensorrt_rtx") as inspector:
            inspector.inspect_prepared(make_input(1024))
            inspector.inspect_prepared(make_input(1100))
        double.assert_given_back()
        assert double.violations == []
        return double.compiled


def cache_file(library: Path) -> Path:
    (found,) = (library / "cache" / "tensorrt_rtx").iterdir()
    return found


def test_the_second_start_compiles_nothing(gpu_bundle: Bundle, tmp_path: Path) -> None:
    library = tmp_path / "library"
    assert start(gpu_bundle, library) == PLANS
    assert stat.S_IMODE(cache_file(library).parent.stat().st_mode) == 0o700
    written = cache_file(library).stat().st_mtime_ns
    assert start(gpu_bundle, library) == []
    assert cache_file(library).stat().st_mtime_ns == written  # nothing new: nothing is written


def test_it_is_written_at_the_first_frame(gpu_bundle: Bundle, tmp_path: Path) -> None:
    """A station runs for months and may end by a kill."""
    library = tmp_path / "library"
    with (
        installed(double_of("tensorrt_rtx"), library),
        Inspector.open(gpu_bundle.path, runtime="tensorrt_rtx") as inspector,
    ):
        inspector.inspect_prepared(make_input(1024))
        assert cache_file(library).read_bytes()


@pytest.mark.parametrize("content", [b"", b"half a", b'{"version": "1.6.0.1", "kernels": ["rgb_extractor"]}'])
def test_a_cache_that_is_refused_is_replaced(gpu_bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "library"
    start(gpu_bundle, library)
    cache_file(library).write_bytes(content)
    assert start(gpu_bundle, library) == PLANS
    assert start(gpu_bundle, library) == []


def test_a_folder_that_cannot_be_written_stops_no_frame(gpu_bundle: Bundle, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "cache").write_text("a file where the folder should be")
    assert start(gpu_bundle, library) == PLANS


def test_tensorrt_keeps_none(gpu_bundle: Bundle, tmp_path: Path) -> None:
    library = tmp_path / "library"
    with (
        installed(double_of("tensorrt"), library) as double,
        Inspector.open(gpu_bundle.path, runtime="tensorrt") as inspector,
    ):
        inspector.inspect_prepared(make_input(1024))
        assert double.compiled == []
    assert not (library / "cache").exists()
