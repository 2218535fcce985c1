"""Where this Python's shared library is, which Triton's Python backend loads; `python -m m3ad.libpython` tells."""

import sys
import sysconfig
from pathlib import Path

from m3ad.errors import MissingDependencyError


def folder_of_libpython() -> Path:
    """The folder of the shared library.

    Raises:
        MissingDependencyError: there is none; Debian and Ubuntu have it in a package of its own.
    """
    name = sysconfig.get_config_var("INSTSONAME") or ""
    debian = f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", debian]
    for folder in (Path(f) for f in folders if f):
        if name.endswith(".so.1.0") and (folder / name).is_file():
            return folder
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise MissingDependencyError(
        f"{sys.executable} was built without a shared library, which Triton's Python backend loads; install "
        f"libpython{version} (Debian and Ubuntu: apt install libpython{version})"
    )


if __name__ == "__main__":
    try:
        folder_of_libpython()
    except MissingDependencyError as error:
        sys.exit(str(error))
