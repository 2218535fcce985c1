"""Compile the portable C++ ops with the machine's C++ compiler: into a wheel, at first use, or as a command.

The library carries the hash of what it was built from, so that `native` never loads one of other sources.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from m3ad.errors import M3adError, MissingDependencyError

LIBRARY_NAME = "libm3ad_ops.so"
PACKAGE = Path(__file__).resolve().parent
# Contraction into FMA would change distances in the last bit, and with them indices; -ffast-math likewise.
# Without errno and traps, which nobody reads, loops with roots and choices are vectorised; values stay the same.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)


def sources() -> list[Path]:
    """Every op's portable C++ and what they share, headers included; none when the package came without them."""
    return sorted([*PACKAGE.glob("*/kernel.[ch]pp"), *PACKAGE.glob("common/*.[ch]pp")])


def source_hash() -> str | None:
    """Hash of the sources and flags; None when the package came without its sources."""
    files = sources()
    if not files:
        return None
    # The platform is the wheel's, as in linux-aarch64: a build for another machine names it.
    return hash_of_files(files, *FLAGS, sysconfig.get_platform())


def hash_of_files(files: Iterable[Path], *words: str) -> str:
    """Sixteen hexadecimal digits of what files hold, of their names, and of the words."""
    digest = hashlib.sha256(" ".join(words).encode())
    for path in files:
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The user's cache of what m3ad builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3ad"


def library_paths() -> list[Path]:
    """Where the library may lie, best first: beside the package, then the user's cache by source hash."""
    return [PACKAGE / LIBRARY_NAME, cache_folder() / f"{Path(LIBRARY_NAME).stem}-{source_hash()}.so"]


def build(target: Path | None = None) -> Path:
    """Compile the library.

    Args:
        target: the file to write; left out, the first of `library_paths` whose folder can be written.

    Returns:
        The library's path.

    Raises:
        MissingDependencyError: no C++ compiler, or no sources.
        M3adError: the compiler refuses the sources.
    """
    version = source_hash()
    if version is None:
        raise MissingDependencyError(
            f"the C++ sources of the m3ad ops are not in {PACKAGE}; install m3ad again, its wheel has them"
        )
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        wanted = f"CXX names {named}, which is not there" if named else "neither c++ nor g++ is installed"
        raise MissingDependencyError(
            f"no C++ compiler: {wanted}; install one (apt install g++) and run again"
        )
    if target is None:
        target = next((p for p in library_paths() if os.access(p.parent, os.W_OK)), library_paths()[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        files = [str(path) for path in sources() if path.suffix == ".cpp"]
        command = [compiler, *FLAGS, f'-DM3AD_SOURCE_HASH="{version}"', *files, "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise M3adError(
                f"{compiler} cannot compile the m3ad ops; it wants C++17:\n{result.stderr.strip()}"
            )
        os.replace(made, target)
    return target


def main() -> int:
    """Build and say where; what is wrong goes to stderr."""
    try:
        path = build()
    except M3adError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
