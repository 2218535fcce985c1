"""Build the portable C++ ops with AddressSanitizer and UBSan, and run cases with them: sanitized.py CASES [SEED]."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from m3ad_plugins import build

# -Og keeps every access; a finding of either ends the process. Conversions of a too large float are UBSan's, too.
FLAGS = ("-Og", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")


def compiled(folder: Path) -> Path:
    """The library, or what the compiler says as an error."""
    made = folder / "sanitized.so"
    plain = [flag for flag in build.FLAGS if flag != "-O3"]
    files = [str(path) for path in build.sources() if path.suffix == ".cpp"]
    subprocess.run(["g++", *plain, *FLAGS, '-DM3AD_SOURCE_HASH="fuzz"', *files, "-o", str(made)], check=True)
    return made


def run(library: Path, cases: int, seed: int) -> "subprocess.CompletedProcess[str]":
    """Run cases in a process of its own; its exit code is that of the sanitizer where it found something."""
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [
        sys.executable,
        str(Path(__file__).with_name("ops_run.py")),
        str(library),
        str(cases),
        str(seed),
    ]
    return subprocess.run(command, env={**os.environ, **runtime}, capture_output=True, text=True, check=False)


def main() -> int:
    """Build, run and say what was found."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(compiled(Path(folder)), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
