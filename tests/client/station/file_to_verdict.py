"""From a file that is closed to its verdict in the ledger: python file_to_verdict.py BUNDLE [FRAMES].

A station in a process of its own judges frames in process; each frame's marker is laid down when its files are closed,
and the next frame comes when the verdict of the last is in the ledger and a random part of a second has passed. On a
machine with other work that says more of it than of a station, so the CPU time of each step is printed besides.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from m3ad.ledger import Ledger
from m3ad_client.station import seen
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from serving import make_frame, write_frame

CONFIG = """
[station]
folder = "station"
[[camera]]
name = "left"
folder = "left"
done_marker = true
threads = 1
bundle = "{bundle}"
[[sink]]
kind = "jsonl"
name = "lines"
path = "verdicts.jsonl"
"""


def measure(folder: Path, bundle: Path, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds from closing the files to the verdict, and those of them that the inspection itself took."""
    (folder / "left" / "rgb").mkdir(parents=True)
    (folder / "station.toml").write_text(CONFIG.format(bundle=bundle.absolute()))
    command = [Path(sys.executable).parent / "m3ad-client", "station", folder / "station.toml"]
    closed: dict[str, float] = {}
    rng = random.Random(0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as station:
        try:
            assert station.stdout is not None
            while "runs; its ledger" not in (text := station.stdout.readline()):
                assert text, "the station ended"
            with Ledger(folder / "station" / "ledger.sqlite") as ledger:
                for n in range(frames):
                    name = f"{n:05}"
                    write_frame(folder / "left", name, make_frame(n % 8, 128, 0.5))
                    (folder / "left" / f"{name}.done").touch()
                    closed[name] = time.time()
                    while not ledger.query("SELECT 1 FROM part WHERE name = ? AND state = 'judged'", name):
                        time.sleep(0.005)
                    time.sleep(rng.random() / 2)
                parts = ledger.parts()
        finally:
            station.send_signal(signal.SIGTERM)
            station.wait(60)
    whole = [((part.judged_at or 0) - closed[part.name]) * 1e3 for part in parts]
    return np.array(whole), np.array([part.inspect_ms for part in parts])


def cpu(folder: Path, bundle: Path, frames: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time in one thread by step, and of the whole way of a frame."""
    (folder / "left" / "rgb").mkdir(parents=True)
    (folder / "station.toml").write_text(CONFIG.format(bundle=bundle.absolute()))
    seen.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[assignment]
    station = Station(read_config(folder / "station.toml"), lambda _: None)
    found: dict[str, list[float]] = {}
    try:
        (line,) = station.lines
        line.seen = lambda one: [found.setdefault(k, []).append(1e3 * v) for k, v in one.step_s.items()]  # type: ignore[func-returns-value]
        for n in range(frames):
            write_frame(folder / "left", f"{n:05}", make_frame(n % 8, 128, 0.5))
            (folder / "left" / f"{n:05}.done").touch()
            started = time.thread_time()
            line.step()
            found.setdefault("everything", []).append((time.thread_time() - started) * 1e3)
    finally:
        station.close()
    return found


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "cpu").mkdir()
        whole, inspected = measure(Path(place), Path(sys.argv[1]), count)
        steps = cpu(Path(place) / "cpu", Path(sys.argv[1]), count)
    for told, values in (
        ("file closed to verdict", whole),
        ("of it reading and inspecting", inspected),
        ("the rest", whole - inspected),
    ):
        p50, p99 = np.percentile(values, (50, 99))
        print(f"{told:28} p50 {p50:6.0f} ms, p99 {p99:6.0f} ms of {count} frames")
    for told, taken in steps.items():
        p50, p99 = np.percentile(taken[3:], (50, 99))
        print(f"CPU time: {told:18} p50 {p50:6.0f} ms, p99 {p99:6.0f} ms")
