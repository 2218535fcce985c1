"""Imports point one way, and the rooms of a line engineer's box need neither torch nor TensorRT nor onnx."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "m3ad": "core",
    "m3ad_plugins": "trt_plugins",
    "m3ad_runtime": "core",
    "m3ad_export": "export",
    "m3ad_triton": "triton_repo",
    "m3ad_calibrate": "calibrate",
    "m3ad_client": "client",
}
MAY_IMPORT = {
    "m3ad": set(),
    "m3ad_plugins": {"m3ad"},
    "m3ad_runtime": {"m3ad", "m3ad_plugins"},
    "m3ad_export": {"m3ad", "m3ad_plugins", "m3ad_runtime"},
    "m3ad_triton": {"m3ad", "m3ad_plugins", "m3ad_runtime"},
    "m3ad_calibrate": {"m3ad", "m3ad_plugins", "m3ad_runtime", "m3ad_export"},
    "m3ad_client": {"m3ad", "m3ad_plugins", "m3ad_runtime"},
}
# The rooms inside m3ad_export, and what each knows of the others and of the files beside them.
INSIDE_EXPORT = {
    "nets": set(),
    "heads": {"nets"},
    "train": {"checkpoints", "detector", "heads", "nets"},
    "graphs": {"detector", "heads", "methods", "nets", "torch_stages"},
    "dense": {"detector", "heads"},
    "baselines": {"dense", "detector", "heads", "method", "methods", "nets", "saved"},
    "methods": {
        "checkpoints",
        "dense",
        "detector",
        "heads",
        "method",
        "nets",
        "official_files",
        "train",
        "weights",
    },
}
# Where engines are built and bundles quantized there is no torch.
WITHOUT_TORCH = (
    "m3ad_export.cli",
    "m3ad_export.doctor",
    "m3ad_export.engine",
    "m3ad_export.graphs.stages",
    "m3ad_calibrate.quantize",
    "m3ad_calibrate.gate",
    "m3ad_calibrate.refit",
)
HEAVY = ("torch", "tensorrt", "tensorrt_rtx", "onnx")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / ROOMS[package] / package).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_one_way(package: str) -> None:
    assert modules(package)
    wrong = {
        str(path.relative_to(ROOT)): sorted(others)
        for path in modules(package)
        if (others := (imported(path) & ROOMS.keys()) - MAY_IMPORT[package] - {package})
    }
    assert wrong == {}


def test_few_files_ask_for_a_room_above_by_name() -> None:
    """Where it is installed: histograms for their C++ form, the bench's table for the export that prepares bundles."""
    asking = set()
    for package in ROOMS:
        for path in modules(package):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            named = {
                str(argument.value).split(".")[0]
                for call in calls
                if ast.unparse(call.func).split(".")[-1] in ("import_module", "find_spec", "__import__")
                for argument in call.args
                if isinstance(argument, ast.Constant)
            }
            asking |= {
                (package, path.stem, room)
                for room in (named & ROOMS.keys()) - MAY_IMPORT[package] - {package}
            }
    assert asking == {("m3ad", "fpfh", "m3ad_plugins"), ("m3ad_client", "candidates", "m3ad_export")}


def test_rooms_of_the_export_know_only_what_they_need() -> None:
    folder = ROOT / "export" / "m3ad_export"
    assert {path.parent.name for path in folder.glob("*/*.py")} == INSIDE_EXPORT.keys()
    wrong = {}
    for path in folder.glob("*/*.py"):
        room = path.parent.name
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "m3ad_export":
                inside = str(node.module).split(".")[1:2] or [alias.name for alias in node.names]
                names.update(inside)
        if others := names - INSIDE_EXPORT[room] - {room}:
            wrong[f"{room}/{path.name}"] = sorted(others)
    assert wrong == {}


@pytest.mark.parametrize("package", ["m3ad_triton", "m3ad_client"])
def test_serving_rooms_never_name_a_heavy_package(package: str) -> None:
    assert {p.name: imported(p) & {*HEAVY} for p in modules(package) if imported(p) & {*HEAVY}} == {}


def test_core_client_and_triton_import_without_heavy_packages() -> None:
    names = [
        ".".join(path.relative_to(ROOT / ROOMS[package]).with_suffix("").parts).removesuffix(".__init__")
        for package in ("m3ad", "m3ad_plugins", "m3ad_runtime", "m3ad_client", "m3ad_triton")
        for path in modules(package)
    ]
    names = [name for name in names if name != "m3ad_plugins.onnx_functions"]  # writes ONNX for the exporter
    assert_importable(names, HEAVY)


def test_engines_and_quantized_bundles_are_made_without_torch() -> None:
    assert_importable(WITHOUT_TORCH, ("torch", "onnxscript"))


# A finder, not None in sys.modules: SciPy looks there for the array libraries it may have been given arrays of.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent}:
            raise ModuleNotFoundError(f'no module named {{name!r}}')
sys.meta_path.insert(0, Absent())
"""


def assert_importable(names: Iterable[str], absent: Iterable[str]) -> None:
    """Import the modules in a process of its own in which the absent packages are not installed."""
    program = ABSENT.format(absent=set(absent)) + "".join(f"import {name}\n" for name in names)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tritonclient_is_known_to_one_file_of_the_client() -> None:
    assert [p.name for p in modules("m3ad_client") if "tritonclient" in imported(p)] == ["triton.py"]


def test_every_folder_of_a_room_is_a_package() -> None:
    """A folder without `__init__.py` is left out of what is installed, which a path of the checkout would hide."""
    folders = {path.parent for room in set(ROOMS.values()) for path in (ROOT / room).rglob("*.py")}
    inside = [f for f in folders if any(part.startswith("m3ad") for part in f.relative_to(ROOT).parts)]
    assert [f for f in inside if not (f / "__init__.py").exists()] == []
