"""Where a `tritonserver` is on this machine and what it needs around it to run the Python stage models.

The official image has everything in place. The wheel nvidia-pytriton holds the same server and Python backend for CPUs,
but in parts: here they are put together, so that no Docker is needed.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from m3ad.errors import MissingDependencyError
from m3ad.libpython import folder_of_libpython

OFFICIAL = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True, slots=True)
class Binary:
    """A tritonserver: its path, the parts of the wheel it came from (or None), and what its process needs."""

    path: Path
    wheel: Path | None = None

    def arguments(self, folder: Path) -> list[str]:
        """Arguments that name the backends; those of a wheel are linked together in `folder`."""
        if self.wheel is None:
            return []
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = self.wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            built = ", ".join(sorted(p.parent.name for p in stub.parents[1].glob("*/*")))
            raise MissingDependencyError(
                f"nvidia-pytriton has no Python backend for Python {version}, only for {built}; use one of these"
            )
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        for part in (*(self.wheel / "backends" / "python").glob("*.*"), stub):
            (backend / part.name).symlink_to(part)
        return [f"--backend-directory={backend.parent}", f"--cache-directory={self.wheel / 'caches'}"]

    def environment(self) -> dict[str, str]:
        """The environment of its process: a wheel's Python stub must find this interpreter and its packages.

        Raises:
            MissingDependencyError: this Python has no shared library the stub could load.
        """
        environment = dict(os.environ)
        if self.wheel is None:
            return environment
        libraries = [*self.wheel.parents[1].glob("nvidia_pytriton.libs"), folder_of_libpython()]
        inherited = environment.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, libraries), *filter(None, [inherited])])
        # The stub ignores PYTHONPATH and PYTHONHOME; it takes the environment of the first `python3` on PATH.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        return environment


def find_binary(path: Path | None = None) -> Binary:
    """Find tritonserver: the given path, else PATH, else the official image's place, else the wheel.

    Raises:
        MissingDependencyError: there is none.
    """
    if path is not None:
        if not os.access(path, os.X_OK) or path.is_dir():
            raise MissingDependencyError(f"{path} is not a program; name the tritonserver binary itself")
        return Binary(path.absolute())
    if on_path := shutil.which("tritonserver"):
        return Binary(Path(on_path))
    if OFFICIAL.is_file():
        return Binary(OFFICIAL)
    spec = importlib.util.find_spec("pytriton")
    for place in (spec.submodule_search_locations or []) if spec else []:
        wheel = Path(place) / "tritonserver"
        if (wheel / "bin" / "tritonserver").is_file():
            return Binary(wheel / "bin" / "tritonserver", wheel)
    raise MissingDependencyError(
        "no tritonserver on PATH, in /opt/tritonserver or in the wheel nvidia-pytriton; install the wheel for a server "
        "on the CPU: pip install --no-deps nvidia-pytriton, or run the official image: m3ad-triton docker REPO"
    )
