"""What the doctor reads of a Jetson, on files laid out as L4T lays them."""

from pathlib import Path

import pytest
from m3ad_export import jetson

# Orin, JetPack 6.2; nvpmodel.conf shortened to the lines that name modes.
ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "var/lib/dpkg/status": "Package: nano\nStatus: install ok installed\nVersion: 6.2-1\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nPriority: standard\nVersion: 6.2+b77\n\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=MODE_15W >\n"
    "< POWER_MODEL ID=2 NAME=MODE_30W >\n< PM_CONFIG DEFAULT=2 >\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
}
THOR = {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull\n",
}


def laid_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def lines(root: Path, python: tuple[int, int, int]) -> list[str]:
    return [f"{'ok' if f.is_well else 'MISS'} {f}" for f in jetson.findings(root, python)]


def test_an_orin_of_jetpack_6(tmp_path: Path) -> None:
    assert lines(laid_out(tmp_path, ORIN), (3, 10, 12)) == [
        "ok Jetson: NVIDIA Jetson AGX Orin Developer Kit",
        "ok L4T: 36.4.3",
        "ok JetPack: 6.2",
        "ok power mode: MODE_30W, mode 2",
        "ok Python: 3.10.12",
    ]


def test_a_thor_without_the_jetpack_package(tmp_path: Path) -> None:
    assert lines(laid_out(tmp_path, THOR), (3, 12, 3))[1:4] == [
        "ok L4T: 38.2.0",
        "ok JetPack: 7, by its L4T; the package nvidia-jetpack is not installed",
        "ok power mode: 120W, mode 1",
    ]


def test_a_python_without_jetpacks_tensorrt_is_told(tmp_path: Path) -> None:
    assert lines(laid_out(tmp_path, ORIN), (3, 11, 2))[-1] == (
        "MISS Python: 3.11.2; JetPack 6's TensorRT is for 3.10: python3.10 -m venv --system-site-packages .venv"
    )


def test_what_is_too_old_or_not_recorded_is_told(tmp_path: Path) -> None:
    old = {"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178\n"}
    assert lines(laid_out(tmp_path, old), (3, 8, 10))[2:] == [
        "MISS JetPack: 5, by its L4T; the package nvidia-jetpack is not installed; "
        "its TensorRT is older than 10.3: flash JetPack 6 or 7",
        "MISS power mode: not recorded; ask: sudo nvpmodel -q",
        "MISS Python: 3.8.10; m3ad needs Python 3.10 or later",
    ]


@pytest.mark.parametrize("python", [(3, 10, 0), (3, 13, 1)])
def test_elsewhere_the_python_alone_is_told(tmp_path: Path, python: tuple[int, int, int]) -> None:
    assert lines(tmp_path, python) == [f"ok Python: {'.'.join(map(str, python))}"]
