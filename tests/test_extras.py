"""Each extra installs what its commands import, and a command whose packages are absent names the extra."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "trt_plugins", "client", "triton_repo", "export", "calibrate")
Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]
# Extras, as docs/deploy.md and docs/train.md name them, and what has to work with no other package.
WORKS = {
    "": ("m3ad_plugins.cli", "m3ad_export.cli", "m3ad_export.doctor", "m3ad.overlay", "m3ad.metrics"),
    "cpu": ("m3ad_runtime.pipeline", "m3ad_runtime.onnx_graph"),
    "client": ("m3ad_client.cli", "m3ad_client.triton"),
    "triton": ("m3ad_triton.cli", "m3ad_triton.server", "m3ad_triton.repository"),
    "engine": ("m3ad_export.cli", "m3ad_export.engine"),
    "rtx": ("m3ad_export.engine", "tensorrt_rtx"),
    "export": ("m3ad_export.bundle_writer", "m3ad_export.training", "m3ad_export.graphs.parity"),
    "calibrate": ("m3ad_calibrate.cli", "m3ad_calibrate.quantize", "m3ad_calibrate.sensitivity"),
    "station": ("m3ad_client.station.line", "m3ad_client.station.page", "m3ad_client.station.api"),
    "sign": ("m3ad.signature",),
}
# Extras that are installed, a command with its first words, and the extra that has what it misses.
MISSES = [
    ("", "client", ["--help"], "client"),
    ("", "triton", ["--help"], "triton"),
    ("", "calibrate", ["--help"], "calibrate"),
    ("cpu,client", "calibrate", ["--help"], "calibrate"),
    ("rtx", "triton", ["--help"], "triton"),
    ("cpu", "export", ["build-engine", "bundle", "--target", "sm89"], "engine"),
    ("cpu", "export", ["bundle", "detector", "bundle", "--data", "."], "export"),
    ("rtx", "export", ["train", "data", "detector"], "export"),
]


def installed(extras: str) -> set[str]:
    """The distributions that `pip install m3ad[extras]` installs, by what the metadata of this environment say."""
    found: set[str] = set()
    todo = [("m3ad", extras)]
    while todo:
        name, wanted = todo.pop()
        found.add(canonicalize_name(name))
        for line in distribution(name).requires or []:
            need = Requirement(line)
            held = [
                need.marker is None or need.marker.evaluate({"extra": e}) for e in ("", *wanted.split(","))
            ]
            if any(held) and (need.extras or canonicalize_name(need.name) not in found):
                todo.append((need.name, ",".join(need.extras)))
    return found


@pytest.fixture(scope="module")
def run_with(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program by a Python that has the packages of the extras and no other."""

    def run(extras: str, program: str) -> subprocess.CompletedProcess[str]:
        site = tmp_path_factory.mktemp("site")
        for name in installed(extras):
            found = distribution(name)
            for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(found.locate_file(top))
        path = os.pathsep.join([str(site), *(str(ROOT / room) for room in ROOMS)])
        command = [sys.executable, "-S", "-c", program]  # -S: without the packages of this environment
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.mark.parametrize("extras", WORKS)
def test_an_extra_has_what_its_commands_import(run_with: Run, extras: str) -> None:
    done = run_with(extras, "".join(f"import {name}\n" for name in WORKS[extras]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("extras", "command", "words", "extra"), MISSES)
def test_a_command_names_the_extra_that_it_lacks(
    run_with: Run, extras: str, command: str, words: list[str], extra: str
) -> None:
    done = run_with(
        extras, f"import sys\nsys.argv = {['x', *words]}\nfrom m3ad.commands import {command}\n{command}()"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f" is not installed, this command needs it: pip install 'm3ad[{extra}]'\n")


def test_doctor_runs_where_nothing_else_is_installed(run_with: Run) -> None:
    done = run_with("", "import sys\nsys.argv = ['x', 'doctor']\nfrom m3ad.commands import export\nexport()")
    assert done.stderr == ""
    assert done.returncode == 1
    assert "MISS ONNX Runtime: is not installed; pip install 'm3ad[cpu]'" in done.stdout
    assert "MISS Triton: no tritonserver" in done.stdout


def test_a_bug_keeps_its_traceback() -> None:
    program = (
        "import sys\nsys.modules['m3ad_client.options'] = None\nfrom m3ad.commands import client\nclient()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
