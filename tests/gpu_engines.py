"""Engines of a bundle for the double of a GPU, written by the real `build_engines` with the double's builder."""

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from gpu_double import GpuDouble, plan_of
from m3ad.bundle import Bundle
from m3ad.contract import OP_DOMAIN, OPS
from m3ad_export import engine
from m3ad_export.engine_builder import BuiltEngine
from m3ad_plugins.library import Finding
from m3ad_runtime import runtime_cache, tensorrt_pipeline

ARENAS = {"head": 7000, "rgb_extractor": 5001}  # bytes; 4096 of the others
LIBRARY = "libm3ad_plugins.so"
RTX_VERSION = "1.7.1.116"


def build(
    patch: pytest.MonkeyPatch,
    bundle: Bundle,
    target: str,
    module: ModuleType,
    layouts: Any = ("chain", "fused"),
    **facts: Any,
) -> Path:
    """Write engines/<target>/ of a bundle: plans of the double, the manifest of m3ad."""

    def build_plan(trt: Any, serialized: bytes, stage: str, *_: Any) -> BuiltEngine:
        model = onnx.load_from_string(serialized)
        plugins = [n.op_type for n in model.graph.node if n.domain == OP_DOMAIN]
        if plugins:  # the double has no kernels: it computes the ops by their bodies
            whole = onnx.load(bundle.path / "onnx" / f"{stage}.onnx")
            model.functions.extend(whole.functions)
        plan = plan_of(model, stage, module, **{"arena": ARENAS.get(stage, 4096), **facts})
        return BuiltEngine(plan, 0.1, {}, True, plugins)

    with patch.context() as inner:
        inner.setattr(engine, "builder_module", lambda _: (module, module.__name__))
        inner.setattr(engine, "compute_capability", lambda _: "8.9")
        inner.setattr(engine, "build_plan", build_plan)
        return engine.build_engines(bundle, target, "fp32", layouts)


@contextmanager
def installed(double: GpuDouble, library: Path) -> Iterator[GpuDouble]:
    """The double in the place of the GPU, its driver, pycuda and TensorRT; the plugin library in a folder."""
    library.mkdir(exist_ok=True)
    (library / LIBRARY).write_text("plugins:" + " ".join(OPS))
    parent = ModuleType("pycuda")
    parent.driver = double.driver  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3AD_PLUGINS_DIR", str(library))
        patch.setattr(runtime_cache, "cache_folder", lambda: library / "cache")
        patch.setitem(sys.modules, "pycuda", parent)
        patch.setitem(sys.modules, "pycuda.driver", double.driver)
        patch.setitem(sys.modules, double.trt.__name__, double.trt)
        patch.setattr(tensorrt_pipeline, "check_driver", lambda: Finding("driver", True, "the double"))
        yield double


def double_of(runtime: str) -> GpuDouble:
    """The double on which the engines of `gpu_bundle` for this runtime run."""
    return GpuDouble() if runtime == "tensorrt" else GpuDouble(name=runtime, version=RTX_VERSION)


TARGETS = {"tensorrt": "native", "tensorrt_rtx": "sm89"}


def with_engines(
    source: Bundle, folder: Path, runtimes: Iterable[str] = TARGETS, layouts: Any = ("chain", "fused")
) -> Bundle:
    """A copy of a bundle with engines for the double, in folder/bundle."""
    shutil.copytree(source.path, folder / "bundle")
    bundle = Bundle.open(folder / "bundle")
    for runtime in runtimes:
        with (
            installed(double_of(runtime), folder / "library") as double,
            pytest.MonkeyPatch.context() as patch,
        ):
            build(patch, bundle, TARGETS[runtime], double.trt, layouts)
    return bundle


@pytest.fixture(scope="session")
def gpu_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Engines of both layouts: TensorRT has the head whole, TensorRT-RTX its parts. Who changes it takes a copy."""
    return with_engines(tiny_bundle, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def double(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GpuDouble]:
    """A GPU with the runtime that the test is parametrised with, or TensorRT."""
    with installed(double_of(getattr(request, "param", "tensorrt")), tmp_path / "library") as found:
        yield found
