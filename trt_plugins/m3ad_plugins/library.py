"""Where the TensorRT plugin library lies, and what a machine is missing to use it: one line per finding.

It loads nothing of TensorRT by itself; `m3ad-export doctor` prints `checks()`.
"""

import ctypes
import ctypes.util
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ad.contract import OP_DOMAIN, OPS
from m3ad.errors import ArtifactError, MissingDependencyError

from m3ad_plugins.build import PACKAGE
from m3ad_plugins.cuda_build import BUILD_COMMAND, LIBRARY, built_folder

TENSORRT_MAJORS = (10, 11)
TENSORRT_MODULES = ("tensorrt", "tensorrt_rtx")
CUDA_MAJORS = (12, 13)
# What CMakeLists.txt compiles kernels for; later ones run from the newest one's PTX.
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "11.0", "12.0")

_CHECKOUT_BUILD = PACKAGE.parents[1] / "build" / "plugins"  # where CMake is told to build in a checkout


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: whether it is well, what was found, and what to do when it is not."""

    subject: str
    is_well: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def _find(name: str) -> Path:
    named = os.environ.get("M3AD_PLUGINS_DIR")
    system = (Path("/usr/local/lib"), Path("/usr/lib"))
    folders = (Path(named),) if named else (built_folder(), _CHECKOUT_BUILD, *system)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in folders)
    raise MissingDependencyError(
        f"{name} is in none of {looked}; build it ({BUILD_COMMAND}) or name its folder in M3AD_PLUGINS_DIR"
    )


def library_path() -> Path:
    """The plugin library itself: for `IPluginRegistry.load_library`, `trtexec --dynamicPlugins`, plan embedding.

    Raises:
        MissingDependencyError: it is not built, or not where it is looked for.
    """
    return _find(LIBRARY)


def shim_path(tensorrt_major: int) -> Path:
    """The shim for hosts that only dlopen (Triton); it needs `library_path()` beside it.

    Args:
        tensorrt_major: 10 or 11.

    Returns:
        The shim's path.

    Raises:
        ValueError: no such TensorRT is supported.
        MissingDependencyError: the shim or the library beside it is missing.
    """
    if tensorrt_major not in TENSORRT_MAJORS:
        raise ValueError(f"tensorrt_major: expected one of {TENSORRT_MAJORS}, got {tensorrt_major}")
    shim = _find(f"libm3ad_plugins_trt{tensorrt_major}.so")
    if not (shim.parent / LIBRARY).is_file():
        raise MissingDependencyError(f"{shim} needs {LIBRARY} beside it; copy or install both together")
    return shim


def load_plugins(trt: Any, library: Path) -> None:
    """Give TensorRT's registry the plugins of the library, if it has not got them yet.

    Raises:
        ArtifactError: it refuses the library, or the library lacks an op or an attribute of one.
    """
    registry = trt.get_plugin_registry()
    if not missing_creators(registry):
        return
    if registry.load_library(str(library)) is None:
        raise ArtifactError(f"{trt.__name__} {trt.__version__} refused {library}; run: m3ad-export doctor")
    if absent := missing_creators(registry):
        raise ArtifactError(
            f"{library} has no plugin for {', '.join(absent)}; build it again: m3ad-plugins build"
        )


def missing_creators(registry: Any) -> list[str]:
    """The custom ops that a registry has no plugin for, or one that would take no notice of an attribute."""
    missing = []
    for name, op in OPS.items():
        creator = registry.get_creator(name, str(op.version), OP_DOMAIN)
        if creator is None:
            missing.append(name)
        elif unknown := op.attributes.keys() - {field.name for field in creator.field_names}:
            missing.append(f"{name} with {', '.join(sorted(unknown))}")
    return missing


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def check_driver() -> Finding:
    """The NVIDIA driver and the CUDA version it runs."""
    driver = _driver()
    if driver is None:
        return Finding(
            "driver", False, "libcuda.so.1 is not here", "install the NVIDIA driver (in Docker: --gpus all)"
        )
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    is_well = major >= min(CUDA_MAJORS)
    advice = "" if is_well else f"m3ad needs CUDA {min(CUDA_MAJORS)} or later: update the driver"
    return Finding("driver", is_well, f"runs CUDA up to {major}.{minor}", advice)


def check_cuda() -> Finding:
    """The CUDA runtime; the plugin library brings its own, so this one serves other programs and builds."""
    for major in sorted(CUDA_MAJORS, reverse=True):
        try:
            cudart = ctypes.CDLL(f"libcudart.so.{major}")
        except OSError:
            continue
        version = ctypes.c_int()
        cudart.cudaRuntimeGetVersion(ctypes.byref(version))
        found = f"runtime {version.value // 1000}.{version.value % 1000 // 10}"
        return Finding("CUDA", True, found)
    advice = "install CUDA 12 or 13 and put its lib folder on LD_LIBRARY_PATH"
    return Finding("CUDA", False, "no libcudart.so.12 or .13", advice)


def check_compute_capability() -> Finding:
    """The first GPU's compute capability against those the kernels are compiled for."""
    subject, driver, device, count = "GPU", _driver(), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Finding(subject, False, "none can be reached", "fix the driver first")
    if count.value == 0:
        return Finding(subject, False, "none is visible", "look at CUDA_VISIBLE_DEVICES")
    name = ctypes.create_string_buffer(100)
    part = [ctypes.c_int(), ctypes.c_int()]
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    for value, attribute in zip(part, (75, 76), strict=True):  # COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    capability = f"{part[0].value}.{part[1].value}"
    oldest, newest = (
        tuple(int(n) for n in c.split(".")) for c in (COMPUTE_CAPABILITIES[0], COMPUTE_CAPABILITIES[-1])
    )
    found = f"{name.value.decode()}, compute capability {capability}"
    if (part[0].value, part[1].value) < oldest:
        return Finding(subject, False, found, f"the kernels need {COMPUTE_CAPABILITIES[0]} or later")
    is_compiled = capability in COMPUTE_CAPABILITIES or (part[0].value, part[1].value) > newest
    return Finding(subject, True, found, "" if is_compiled else "runs the kernels of a lower capability")


def check_tensorrt() -> Finding:
    """The Python package of TensorRT and its version."""
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        is_well = int(version.split(".")[0]) in TENSORRT_MAJORS
        return Finding(
            "TensorRT", is_well, version, "" if is_well else "m3ad supports 10.3 to 11.4: install one of them"
        )
    advice = "pip install tensorrt (10.3 to 11.4); on a Jetson: apt install python3-libnvinfer"
    return Finding("TensorRT", False, "its Python package is not here", advice)


def check_plugin_library() -> Finding:
    """The plugin library and the shims beside it."""
    try:
        library = library_path()
    except MissingDependencyError as error:
        found, _, advice = str(error).partition("; ")
        return Finding("plugin library", False, found, advice)
    shims = [str(m) for m in TENSORRT_MAJORS if (library.parent / f"libm3ad_plugins_trt{m}.so").is_file()]
    try:
        ctypes.CDLL(str(library)).getCreators  # noqa: B018  a missing export raises
    except OSError as error:
        return Finding(
            "plugin library", False, f"{library} cannot be loaded: {error}", "build it on this machine"
        )
    except AttributeError:
        return Finding(
            "plugin library", False, f"{library} exports no getCreators", f"build it again: {BUILD_COMMAND}"
        )
    if not shims:
        return Finding(
            "plugin library", True, f"{library}, no shim", "Triton needs one: build with TensorRT's headers"
        )
    return Finding("plugin library", True, f"{library}, shims for TensorRT {' and '.join(shims)}")


def check_registry(module: str = "tensorrt") -> Finding:
    """Whether the registry of TensorRT, or of TensorRT-RTX, takes the library and then knows every op."""
    subject = f"plugin registry of {module}"
    try:
        trt = importlib.import_module(module)
    except ImportError:
        return Finding(subject, False, "not asked, TensorRT is missing", "install TensorRT first")
    try:
        library = library_path()
    except MissingDependencyError:
        return Finding(subject, False, "not asked, the plugin library is missing", "build it first")
    registry = trt.get_plugin_registry()
    if missing_creators(registry) and registry.load_library(str(library)) is None:
        return Finding(
            subject, False, f"{module} refuses {library}", "build it for this CUDA major and processor"
        )
    absent = missing_creators(registry)
    if absent:
        return Finding(subject, False, f"no creator of {', '.join(absent)}", f"build again: {BUILD_COMMAND}")
    return Finding(subject, True, f"knows {', '.join(OPS)}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_driver,
    check_cuda,
    check_compute_capability,
    check_tensorrt,
    check_plugin_library,
    check_registry,
)


def checks() -> list[Finding]:
    """Every check, in the order in which to fix what is wrong."""
    return [check() for check in CHECKS]
