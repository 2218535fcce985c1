"""Build the TensorRT plugin library with CMake, nvcc and TensorRT's headers, from a checkout or an installed wheel."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from m3ad.errors import M3adError, MissingDependencyError

from m3ad_plugins.build import PACKAGE, cache_folder, hash_of_files

LIBRARY = "libm3ad_plugins.so"
BUILD_COMMAND = "m3ad-plugins build"


def built_folder() -> Path:
    """Where `m3ad-plugins build` writes: named by the hash of the sources, so that an update finds no older build."""
    sources = (path for path in PACKAGE.glob("*/*") if path.suffix in (".cpp", ".hpp", ".cu", ".cuh"))
    return cache_folder() / f"plugins-{hash_of_files(sorted(sources))}"


def build_plugins(
    tensorrt: Path | None = None,
    cuda: Path | None = None,
    architectures: str | None = None,
    out: Path | None = None,
) -> Path:
    """Compile kernels, plugins and shim by this package's CMakeLists.txt.

    Args:
        tensorrt: folder whose include/ has NvInferRuntime.h; left out, the system's.
        cuda: the CUDA toolkit; left out, that of nvcc on PATH or /usr/local/cuda.
        architectures: SMs, as in "87" or "86;89"; left out, all that m3ad has kernels for and the toolkit knows.
        out: folder to write; left out, `built_folder()`.

    Returns:
        The plugin library's path.

    Raises:
        MissingDependencyError: no CMake.
        M3adError: the build stops; the text is that of CMake or the compiler.
    """
    beside = (
        Path(sys.executable).parent / "cmake"
    )  # of the package on PyPI, in an environment that is not activated
    cmake = shutil.which("cmake") or (str(beside) if beside.is_file() else None)
    if cmake is None:
        raise MissingDependencyError("the plugins are built with CMake, which is not here: pip install cmake")
    target = out or built_folder()
    options = ["-DM3AD_REQUIRE_PLUGINS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    if tensorrt is not None:
        options.append(f"-DTensorRT_ROOT={tensorrt.resolve()}")
    if toolkit := cuda or _toolkit():
        options.append(f"-DCUDAToolkit_ROOT={toolkit.resolve()}")
    if architectures is not None:
        options.append(f"-DM3AD_CUDA_ARCHITECTURES={architectures}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".plugins-") as work:
        made = Path(work) / "made"
        _run([cmake, "-S", str(PACKAGE), "-B", work, *options])
        _run([cmake, "--build", work, "--parallel", str(os.cpu_count())])
        _run([cmake, "--install", work, "--prefix", str(made)])
        target.mkdir(exist_ok=True)
        # The library last: whoever finds it finds its shim.
        for path in sorted(made.iterdir(), key=lambda p: p.name == LIBRARY):
            os.replace(path, target / path.name)
    return target / LIBRARY


def _toolkit() -> Path | None:
    found = shutil.which("nvcc")
    places = [Path(found).resolve().parents[1]] if found else []
    places.append(Path("/usr/local/cuda"))
    return next((place for place in places if (place / "bin" / "nvcc").is_file()), None)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise M3adError("the plugins cannot be built:\n" + "\n".join(f"  {line}" for line in said[-30:]))
