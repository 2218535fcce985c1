"""Python's shared library: found where Triton's Python backend loads it from, or named with its package."""

import ctypes
import subprocess
import sys
import sysconfig
from typing import Any

import pytest
from m3ad.errors import MissingDependencyError
from m3ad.libpython import folder_of_libpython
from m3ad_export import doctor

STATIC = {"INSTSONAME": "libpython3.11.a", "LIBDIR": "/nowhere"}


def test_it_is_a_library_of_this_python() -> None:
    library = ctypes.CDLL(str(folder_of_libpython() / str(sysconfig.get_config_var("INSTSONAME"))))
    library.Py_GetVersion.restype = ctypes.c_char_p
    assert library.Py_GetVersion().decode().split()[0] == sys.version.split()[0]


def test_a_python_without_it_is_told_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", STATIC.get)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(
        MissingDependencyError, match=rf"without a shared library.*apt install libpython{version}\)$"
    ):
        folder_of_libpython()
    found: dict[str, Any] = {f.subject: f for f in doctor.findings()}
    assert not found["Triton"].is_well
    assert "apt install libpython" in found["Triton"].advice


def test_setup_hears_of_it() -> None:
    program = (
        f"import sysconfig, runpy\nsysconfig.get_config_var = {STATIC}.get\n"
        "runpy.run_module('m3ad.libpython', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "apt install libpython" in done.stderr
    assert "Traceback" not in done.stderr
