"""Engines in this process, through the double of a GPU: the maps of the CPU, and nothing done that may not be."""

from pathlib import Path

import numpy as np
import pytest
from conftest import make_input
from gpu_double import GpuDouble
from gpu_engines import ARENAS, double_of, installed
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.preprocess import ModelInput
from m3ad_client.runner import load
from m3ad_runtime.pipeline import Inspector
from m3ad_runtime.tensorrt_pipeline import TensorRtPipeline

BOTH = pytest.mark.parametrize("double", ["tensorrt", "tensorrt_rtx"], indirect=True)
HEADS = {
    "tensorrt": ["head"],
    "tensorrt_rtx": ["head_tokens", *["head_rows", "head_scores"] * 2, "head_vote"],
}


@BOTH
@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_maps_are_those_of_the_cpu(gpu_bundle: Bundle, double: GpuDouble, layout: Layout) -> None:
    """Frames of all sizes in turn, in the same memory: the largest before the smallest."""
    cpu = Inspector(gpu_bundle, layout)
    with Inspector.open(gpu_bundle.path, layout, runtime=double.trt.__name__) as inspector:  # type: ignore[arg-type]
        taken = double.used()
        for points in (17000, 50176, 1024):
            frame = make_input(points, points)
            want = cpu.inspect_prepared(frame, with_maps=True)
            found = inspector.inspect_prepared(frame, with_maps=True)
            np.testing.assert_allclose(found.anomaly_map, want.anomaly_map, rtol=2e-4, atol=2e-6)
            np.testing.assert_allclose(found.score_maps, want.score_maps, rtol=2e-4, atol=2e-5)
            assert found.score == pytest.approx(want.score, rel=1e-4)
            assert found.stage_ms.keys() == want.stage_ms.keys()
        assert double.peak == taken == inspector.device_bytes
        assert (inspector.device, inspector.precision) == ("double of a GPU", "fp32")
        assert {path.suffix for path in inspector.model_files} == {".plan"}
    double.assert_given_back()


@BOTH
def test_stages_run_in_order_and_share_the_largest_arena(gpu_bundle: Bundle, double: GpuDouble) -> None:
    with Inspector.open(gpu_bundle.path, runtime=double.trt.__name__) as inspector:  # type: ignore[arg-type]
        inspector.inspect_prepared(make_input(3000))
        head = HEADS[double.trt.__name__]
        assert double.runs == ["rgb_extractor", "xyz_extractor", *head]
        pipeline = inspector.pipeline
        assert isinstance(pipeline, TensorRtPipeline)
        assert pipeline.arena_bytes == max(ARENAS.get(name, 4096) for name in double.runs)
        assert double.used() == pipeline.arena_bytes + pipeline.buffer_bytes


@BOTH
def test_what_was_given_back_is_the_callers(gpu_bundle: Bundle, double: GpuDouble) -> None:
    """The next frame overwrites pinned memory, not the inspection of the last."""
    with Inspector.open(gpu_bundle.path, runtime=double.trt.__name__) as inspector:  # type: ignore[arg-type]
        first = inspector.inspect_prepared(make_input(2000, 1), with_maps=True)
        kept = first.anomaly_map.copy()
        inspector.inspect_prepared(make_input(2500, 2))
        np.testing.assert_array_equal(first.anomaly_map, kept)
        again = inspector.inspect_prepared(make_input(2000, 1))
    np.testing.assert_array_equal(again.anomaly_map, kept)
    inspector.close()  # a second time does nothing
    double.assert_given_back()


def test_the_bench_runs_engines_and_says_so(gpu_bundle: Bundle, double: GpuDouble) -> None:
    runner = load(gpu_bundle.path, "fused", 1, "tensorrt")
    frame: ModelInput = make_input(1024)
    anomaly_map, stage_ms = runner.run(frame)
    np.testing.assert_array_equal(anomaly_map, runner.run(frame)[0])
    assert stage_ms == dict.fromkeys(("rgb_extractor", "xyz_extractor", "head"), 1.0)  # the double's clock
    told = runner.conditions
    assert (told["runtime"], told["device"]) == ("TensorRT 10.13.3.9", "double of a GPU")
    plans = ("rgb_extractor", "xyz_extractor", "head")
    sizes = [(gpu_bundle.path / "engines" / "native" / f"{name}.plan").stat().st_size for name in plans]
    assert told["parameter_bytes"] == sum(sizes)
    assert runner.device_bytes is not None
    assert runner.device_bytes() == double.used()
    cpu = load(gpu_bundle.path, "fused", 1, "onnxruntime")
    assert cpu.conditions["runtime"].startswith("ONNX Runtime 1.")
    assert (cpu.conditions["device"], cpu.device_bytes) == ("cpu", None)
    onnx = [
        gpu_bundle.path / "onnx" / name
        for stage in plans
        for name in gpu_bundle.contract.method.cpu[stage].files
    ]
    assert cpu.conditions["parameter_bytes"] == sum(path.stat().st_size for path in onnx)


def test_auto_takes_the_engines_that_fit(gpu_bundle: Bundle, double: GpuDouble, tmp_path: Path) -> None:
    said: list[str] = []
    with Inspector.open(gpu_bundle.path, say=said.append) as inspector:
        assert inspector.runtime == "TensorRT 10.13.3.9"
    with (
        installed(double_of("tensorrt_rtx"), tmp_path / "library"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setitem(__import__("sys").modules, "tensorrt", None)
        with Inspector.open(gpu_bundle.path, say=said.append) as inspector:
            assert inspector.runtime == "TensorRT-RTX 1.7.1.116"
    assert said == []
