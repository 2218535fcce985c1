"""Power from lines as tegrastats prints them, from a program that prints them, and from a double of NVML."""

import subprocess
from pathlib import Path
from threading import Event
from time import sleep

import pytest
from m3ad_client import power
from m3ad_client.power import Energy, board_watts, energy_of

ORIN_NX = (
    "11-26-2026 10:00:00 RAM 2532/15388MB (lfb 4x4MB) SWAP 0/7694MB CPU [1%@729,0%@729] GR3D_FREQ 0% "
    "cpu@47.3C soc2@46C tj@47.3C VDD_IN 4970mW/4980mW VDD_CPU_GPU_CV 514mW/515mW VDD_SOC 1459mW/1459mW"
)
AGX_ORIN = (
    "11-26-2026 10:00:00 RAM 3103/62780MB (lfb 2x4MB) CPU [0%@729] GR3D_FREQ 0% VDD_GPU_SOC 3205mW/3200mW "
    "VDD_CPU_CV 801mW/800mW VIN_SYS_5V0 3936mW/3930mW VDDQ_VDD2_1V8AO 605mW/600mW"
)
THOR = (
    "11-26-2026 10:00:00 RAM 4810/125772MB (lfb 2x4MB) CPU [0%@972] GR3D_FREQ @[0,0,0] gpu@38C "
    "VDD_GPU 2376mW/2376mW VDD_CPU_SOC_MSS 5544mW/5544mW VIN_SYS_5V0 5240mW/5240mW VIN 25344mW/25344mW"
)


@pytest.mark.parametrize(
    ("line", "watts"), [(ORIN_NX, 4.97), (AGX_ORIN, 3.205 + 0.801 + 3.936 + 0.605), (THOR, 25.344)]
)
def test_the_boards_input_or_the_sum_of_its_rails(line: str, watts: float) -> None:
    assert board_watts(line) == pytest.approx(watts)
    assert board_watts("RAM 2532/15388MB CPU [1%@729]") is None


def test_joules_are_power_times_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program of that name prints lines while a frame waits for two more; the clock is ours."""
    script = tmp_path / "tegrastats"
    script.write_text(f"#!/bin/sh\nwhile :; do echo '{ORIN_NX}'; sleep 0.01; done\n")
    script.chmod(0o755)
    seen: list[float] = []
    found = board_watts
    monkeypatch.setattr(power.shutil, "which", lambda name: str(script))
    monkeypatch.setattr(power, "board_watts", lambda line: seen.append(0.0) or found(line))
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(clock))
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        power.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )

    def run() -> None:
        until = len(seen) + 3
        while len(seen) < until:
            sleep(0.001)

    energy = energy_of(run, 3)
    assert isinstance(energy, Energy)
    assert (energy.source, energy.frames) == ("tegrastats", 3)
    assert energy.watts == pytest.approx(4.97)
    assert energy.joules_per_frame == pytest.approx(4.97 * 6 / 3)
    assert started[0].poll() is not None


NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) { *d = 0; return 0; }
int nvmlDeviceGetPowerUsage(void* d, unsigned* mw) { *mw = 65000; return %d; }
"""


@pytest.mark.parametrize(("code", "says"), [(0, None), (3, "NOT_SUPPORTED"), (15, "answers error 15")])
def test_nvml_tells_or_says_that_it_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, says: str | None
) -> None:
    (tmp_path / "nvml.c").write_text(NVML % code)
    library = tmp_path / f"libnvml{code}.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    load = power.ctypes.CDLL
    monkeypatch.setattr(power.shutil, "which", lambda name: None)
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: load(str(library)))
    monkeypatch.setattr(power, "INTERVAL_MS", 1)
    energy = energy_of(lambda: Event().wait(0.02), 2)
    if says is None:
        assert isinstance(energy, Energy)
        assert (energy.source, energy.watts) == ("NVML", 65.0)
    else:
        assert isinstance(energy, str)
        assert says in energy


def test_without_a_source_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(power.shutil, "which", lambda name: None)
    monkeypatch.setattr(power.ctypes, "CDLL", absent)
    assert energy_of(lambda: None, 1) == "neither tegrastats nor NVML is on this machine"
