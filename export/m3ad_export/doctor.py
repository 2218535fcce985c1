"""What `m3ad-export doctor` looks at beyond the plugin room's own checks: the other runtimes and the server."""

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

from m3ad.errors import MissingDependencyError
from m3ad.libpython import folder_of_libpython
from m3ad_plugins.library import Finding, check_registry, checks

from m3ad_export import jetson


def findings() -> list[Finding]:
    """Every finding, in the order in which to fix what is wrong."""
    return [
        *jetson.findings(),
        _package("ONNX Runtime", "onnxruntime", "pip install 'm3ad[cpu]'"),
        _native_ops(),
        _package(
            "TensorRT-RTX", "tensorrt-rtx-cu13", "pip install 'm3ad[rtx]' to build engines ahead of time"
        ),
        *checks(),
        *([check_registry("tensorrt_rtx")] if importlib.util.find_spec("tensorrt_rtx") else []),
        _triton(),
    ]


def _package(subject: str, name: str, advice: str) -> Finding:
    try:
        return Finding(subject, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(subject, False, "is not installed", advice)


def _native_ops() -> Finding:
    from m3ad_plugins import native

    if native.library() is None:
        return Finding(
            "CPU ops", False, "NumPy form", "install a C++ compiler and run: python -m m3ad_plugins.build"
        )
    return Finding("CPU ops", True, "compiled")


def _triton() -> Finding:
    if path := shutil.which("tritonserver") or next(
        iter(Path("/opt/tritonserver/bin").glob("tritonserver")), None
    ):
        return Finding("Triton", True, str(path))
    if importlib.util.find_spec("pytriton"):
        server = f"CPU server of nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}"
        try:
            folder_of_libpython()
        except MissingDependencyError as error:
            return Finding("Triton", False, server, str(error))
        return Finding("Triton", True, server)
    advice = "use NVIDIA's image, or pip install --no-deps nvidia-pytriton==0.7.0 for a CPU server"
    return Finding("Triton", False, "no tritonserver", advice)
