"""Finding the plugin library, and what the doctor says about a machine."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from m3ad.contract import OP_DOMAIN, OPS
from m3ad.errors import MissingDependencyError
from m3ad_plugins import library
from m3ad_plugins.onnx_functions import folder_of

SOURCES = Path(__file__).parents[2] / "trt_plugins" / "m3ad_plugins"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("M3AD_PLUGINS_DIR", str(tmp_path))
    return tmp_path


def compile_library(path: Path, source: str) -> None:
    """A real shared library: what is under test is dlopen and the symbols it finds."""
    path.with_suffix(".cpp").write_text(source)
    command = ["c++", "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".cpp"))]
    subprocess.run(command, check=True)


def test_missing_library_names_the_build_command(folder: Path) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"libm3ad_plugins.so is in none of .*; build it \(m3ad-plugins build\)"
    ):
        library.library_path()
    assert str(library.check_plugin_library()).startswith("plugin library: libm3ad_plugins.so is in none of")
    assert not library.check_plugin_library().is_well


def test_shim_needs_the_library_beside_it(folder: Path) -> None:
    (folder / "libm3ad_plugins_trt11.so").touch()
    with pytest.raises(MissingDependencyError, match=r"trt11\.so needs .* beside it; copy or install"):
        library.shim_path(11)
    (folder / library.LIBRARY).touch()
    assert library.shim_path(11) == folder / "libm3ad_plugins_trt11.so"
    with pytest.raises(MissingDependencyError, match=r"libm3ad_plugins_trt10.so is in none of"):
        library.shim_path(10)
    with pytest.raises(ValueError, match=r"tensorrt_major: expected one of \(10, 11\), got 9"):
        library.shim_path(9)


def test_doctor_tells_a_broken_library_from_a_sound_one(folder: Path) -> None:
    (folder / library.LIBRARY).write_bytes(b"not a library")
    assert "cannot be loaded" in library.check_plugin_library().found
    (folder / library.LIBRARY).unlink()
    compile_library(folder / library.LIBRARY, "int other;")
    assert "exports no getCreators; build it again: m3ad-plugins build" in str(library.check_plugin_library())


def test_doctor_accepts_a_library_with_creators_and_names_its_shims(folder: Path) -> None:
    compile_library(folder / library.LIBRARY, 'extern "C" void getCreators() {}')
    assert "no shim; Triton needs one" in str(library.check_plugin_library())
    (folder / "libm3ad_plugins_trt10.so").touch()
    assert str(library.check_plugin_library()).endswith("shims for TensorRT 10")


def test_every_check_answers_in_one_line_with_advice() -> None:
    for finding in library.checks():
        assert "\n" not in str(finding)
        assert finding.is_well or finding.advice


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_machine_without_driver_is_told_to_install_it() -> None:
    assert str(library.check_driver()) == (
        "driver: libcuda.so.1 is not here; install the NVIDIA driver (in Docker: --gpus all)"
    )


def test_cmake_compiles_for_the_capabilities_the_doctor_names() -> None:
    listed = ";".join(c.replace(".", "") for c in library.COMPUTE_CAPABILITIES)
    assert f'M3AD_CUDA_ARCHITECTURES "{listed}"' in (SOURCES / "CMakeLists.txt").read_text()


def test_plugins_have_the_contracts_names_and_attributes() -> None:
    for op in OPS.values():
        source = (SOURCES / folder_of(op.name) / "plugin.cpp").read_text()
        assert f'kNAME[] = "{op.name}", kVERSION[] = "{op.version}"' in source
        assert f"kINPUTS = {len(op.inputs)}, kOUTPUTS = {len(op.outputs)};" in source
        assert f"Registered<{op.name}> const" in source
        for attribute in op.attributes:
            assert f'{{"{attribute}", ' in source


def test_shim_asks_the_registry_for_an_op_of_the_contract() -> None:
    source = (SOURCES / "plugin" / "shim.cpp").read_text()
    (asked,) = re.findall(r'getCreator\("(\w+)", "(\d+)", "(\w+)"\)', source)
    assert asked in {(op.name, str(op.version), OP_DOMAIN) for op in OPS.values()}
