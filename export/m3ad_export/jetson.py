"""What a Jetson says of itself, read from the files its software leaves: L4T, JetPack, the power mode, and its Python.

Layouts: /etc/nv_tegra_release and the package database of L4T 35 to 38, nvpmodel's configuration and state.
"""

import re
import sys
from pathlib import Path

from m3ad_plugins.library import Finding

OLDEST_PYTHON = (3, 10)
JETPACK_OF_L4T = {35: 5, 36: 6, 38: 7}
# The Python that JetPack's own TensorRT module is for.
PYTHON_OF_JETPACK = {6: (3, 10), 7: (3, 12)}


def findings(root: Path = Path("/"), python: tuple[int, int, int] = sys.version_info[:3]) -> list[Finding]:
    """A line each; without /etc/nv_tegra_release, the Python alone.

    Args:
        root: of the files.
        python: the version that runs.
    """
    release = _read(root / "etc/nv_tegra_release")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if found is None:
        return [_python(python, None)]
    major, revision = int(found[1]), found[2]
    packaged = _package_version(_read(root / "var/lib/dpkg/status"), "nvidia-jetpack")
    jetpack = int(packaged.split(".")[0]) if packaged[:1].isdigit() else JETPACK_OF_L4T.get(major)
    return [
        _board(root),
        Finding("L4T", True, f"{major}.{revision}"),
        _jetpack(packaged, jetpack),
        _power_mode(root),
        _python(python, jetpack),
    ]


def _board(root: Path) -> Finding:
    model = _read(root / "proc/device-tree/model").rstrip("\0\n")
    return Finding("Jetson", True, model or "of unknown model")


def _jetpack(packaged: str, major: int | None) -> Finding:
    if major is None:
        return Finding("JetPack", False, "of unknown version", "m3ad is for JetPack 6 and 7")
    found = packaged or f"{major}, by its L4T; the package nvidia-jetpack is not installed"
    if major not in PYTHON_OF_JETPACK:
        return Finding("JetPack", False, found, "its TensorRT is older than 10.3: flash JetPack 6 or 7")
    return Finding("JetPack", True, found)


def _power_mode(root: Path) -> Finding:
    subject, advice = "power mode", "ask: sudo nvpmodel -q"
    state = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if state is None:
        return Finding(subject, False, "not recorded", advice)
    number = int(state[1])
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", _read(root / "etc/nvpmodel.conf"))
    name = next((name for mode, name in modes if int(mode) == number), None)
    return Finding(subject, True, f"{name or 'unnamed'}, mode {number}")


def _python(running: tuple[int, int, int], jetpack: int | None) -> Finding:
    found = ".".join(map(str, running))
    if running[:2] < OLDEST_PYTHON:
        return Finding("Python", False, found, "m3ad needs Python 3.10 or later")
    wanted = PYTHON_OF_JETPACK.get(jetpack) if jetpack is not None else None
    if wanted is not None and running[:2] != wanted:
        version = ".".join(map(str, wanted))
        advice = f"JetPack {jetpack}'s TensorRT is for {version}: python{version} -m venv --system-site-packages .venv"
        return Finding("Python", False, found, advice)
    return Finding("Python", True, found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _package_version(database: str, package: str) -> str:
    """The version of an installed package in dpkg's database; empty when there is none."""
    for paragraph in database.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Package") == package and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version", "").partition("+")[0]
    return ""
