"""Joules of a frame: the board's power while frames run, from tegrastats on a Jetson, from NVML elsewhere."""

import ctypes
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERVAL_MS = 50
# The rail of the whole module; a board without one is the sum of its rails.
INPUT_RAILS = ("VDD_IN", "VIN")
NVML_NOT_SUPPORTED = 3


@dataclass(frozen=True, slots=True)
class Energy:
    """Mean power over some frames, idle share included, and what a frame takes of it."""

    source: str
    frames: int
    watts: float
    joules_per_frame: float


def energy_of(run: Callable[[], object], frames: int) -> Energy | str:
    """Run a frame several times and measure the power meanwhile; a sentence where nothing here measures power.

    E = mean(P) * t / frames
    """
    watts: list[float] = []
    try:
        with _sampled(watts) as source:
            watts.clear()
            started = time.perf_counter()
            for _ in range(frames):
                run()
            seconds = time.perf_counter() - started
    except OSError as error:
        return str(error)
    if not watts:
        return f"{source} said nothing in {seconds:.2f} s; measure more frames"
    mean = sum(watts) / len(watts)
    return Energy(source, frames, mean, mean * seconds / frames)


def board_watts(line: str) -> float | None:
    """The board's power in a line of tegrastats, in watts; None in a line without power.

    Each rail stands there as `VDD_IN 4970mW/4980mW`, its power now and on average.
    """
    rails = {name: int(now) / 1e3 for name, now in re.findall(r"(\w+) (\d+)mW/\d+mW", line)}
    if not rails:
        return None
    return next((rails[name] for name in INPUT_RAILS if name in rails), sum(rails.values()))


@contextmanager
def _sampled(watts: list[float]) -> Iterator[str]:
    """Append readings while the block runs; yields where they come from.

    Raises:
        OSError: nothing here measures power; the text says what was tried.
    """
    if program := shutil.which("tegrastats"):
        with _tegrastats(program, watts):
            yield "tegrastats"
        return
    read = _nvml_power()
    done = threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL_MS / 1e3):
            watts.append(read())

    watts.append(read())  # what it refuses, it refuses before a frame has run
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield "NVML"
    finally:
        done.set()
        sampler.join()


@contextmanager
def _tegrastats(program: str, watts: list[float]) -> Iterator[None]:
    process = subprocess.Popen(
        [program, "--interval", str(INTERVAL_MS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    lines = process.stdout

    def read() -> None:
        watts.extend(value for line in lines if (value := board_watts(line)) is not None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        process.terminate()
        process.wait()
        reader.join()
        lines.close()


def _nvml_power() -> Callable[[], float]:
    """A function that reads the first GPU's power in watts.

    Raises:
        OSError: there is no NVML, or it does not tell.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise OSError("neither tegrastats nor NVML is on this machine") from None
    device, milliwatts = ctypes.c_void_p(), ctypes.c_uint()
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
        raise OSError("NVML finds no GPU")

    def read() -> float:
        code = nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(milliwatts))
        if code == NVML_NOT_SUPPORTED:
            raise OSError(
                "NVML answers NOT_SUPPORTED to power queries of this GPU, and there is no tegrastats"
            )
        if code != 0:
            raise OSError(f"NVML answers error {code} to a power query")
        return milliwatts.value / 1e3

    read()
    return read
