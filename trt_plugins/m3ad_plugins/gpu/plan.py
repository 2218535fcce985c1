"""The steps of `m3ad-plugins gpu`, and what this machine lacks for each."""

import importlib.util
import shutil
import sys
from pathlib import Path

from m3ad.errors import MissingDependencyError

from m3ad_plugins.cuda_build import BUILD_COMMAND
from m3ad_plugins.gpu.enqueue import headers
from m3ad_plugins.gpu.steps import Step
from m3ad_plugins.library import library_path

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = "99"  # exit code of compute-sanitizer when it has found something


def lacking(*needs: str) -> str:
    """One sentence of what is not there; empty strings are what is."""
    missing = [need for need in needs if need]
    return f"not here: {', '.join(missing)}" if missing else ""


def gpu_steps(
    device: str,
    work: Path,
    tensorrt: Path | None,
    detector: Path | None,
    bundle: Path | None,
    data: Path | None,
) -> list[Step]:
    """What is proven and measured, in this order.

    Args:
        device: the GPU as `gpu_of_this_machine` names it, empty if there is none.
        work: a folder of the run's own.
        tensorrt: where TensorRT's headers are, the system's if None.
        detector: for the whole frame; random weights if None.
        bundle: whose engines are built and run; none are if None.
        data: a category whose frames they are run on.
    """
    gpu = "" if device else "an NVIDIA GPU that nvidia-smi answers for"
    nvcc = _program("nvcc", "of the CUDA toolkit 12 or 13")
    sanitizer = _program("compute-sanitizer", "of the CUDA toolkit")
    include = "" if headers(tensorrt) else "TensorRT's headers (--tensorrt FOLDER)"
    python = [sys.executable, "-m"]
    table = [*python, "m3ad_plugins.gpu.case_table", str(work)]
    capability = device.rpartition(",")[2].strip()
    enqueue = [*python, "m3ad_plugins.gpu.enqueue", str(work)]
    enqueue += ["--tensorrt", str(tensorrt)] if tensorrt else []
    enqueue += ["--architecture", capability.replace(".", "")] if capability.count(".") == 1 else []
    frame = [*python, "m3ad_export.baselines.graphed", str(work / "libkernels.so")]
    frame += ["--detector", str(detector)] if detector else []
    engines = [*_command("m3ad_export"), "build-engine", str(bundle), "--target", "native", "--json"]
    bench = [
        *_command("m3ad_client"),
        "bench",
        str(data),
        "--bundle",
        str(bundle),
        "--frames",
        "20",
        "--json",
    ]
    tensorrt_here = (
        gpu,
        _module("tensorrt", "of this machine's CUDA"),
        _module("pycuda", "m3ad[gpu]"),
        _plugin_library(),
        "" if bundle else "a bundle (--bundle FOLDER)",
    )
    return [
        Step("case table", table, 420, lacking(gpu, nvcc)),
        Step(
            "enqueue",
            enqueue,
            300,
            lacking(gpu, nvcc, include, _program("cmake", "(pip install 'm3ad[plugins]')")),
        ),
        Step(
            "whole frame in PyTorch",
            frame,
            240,
            lacking(gpu, nvcc, _module("torch", "m3ad[export]"), _module("onnx", "m3ad[export]")),
            after="case table",
        ),
        *(
            Step(
                f"compute-sanitizer {tool}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", FOUND, *table, "--few"],
                180,
                lacking(gpu, nvcc, sanitizer),
                after="case table",
            )
            for tool in SANITIZER_TOOLS
        ),
        Step(
            "engines of TensorRT",
            engines,
            600,
            lacking(*tensorrt_here, _module("onnx", "m3ad[engine]")),
        ),
        Step(
            "frames by TensorRT in process",
            [*bench, "--runtime", "tensorrt"],
            240,
            lacking(*tensorrt_here, "" if data else "frames (--data FOLDER)"),
            after="engines of TensorRT",
        ),
    ]


def _command(package: str) -> list[str]:
    return [sys.executable, "-c", f"from {package}.cli import main; main()"]


def _plugin_library() -> str:
    try:
        library_path()
    except MissingDependencyError:
        return f"the plugin library ({BUILD_COMMAND})"
    return ""


def _program(name: str, where: str) -> str:
    return "" if shutil.which(name) else f"{name} {where}"


def _module(name: str, where: str) -> str:
    return "" if importlib.util.find_spec(name) else f"the Python package {name} ({where})"
