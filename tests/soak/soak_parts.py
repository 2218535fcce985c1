"""What both halves of the soak share: frames of many sizes, servers, memory over the life of a process."""

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from conftest import make_input, make_tiny_detector
from m3ad.frames import Frame
from m3ad_export.bundle_writer import write_bundle
from m3ad_runtime.pipeline import Inspection
from serving import make_frame

LOOK = 10  # frames between two looks at memory
LEAST_LOOKS = 40  # of a process that can be told to grow
BIN = Path(sys.executable).parent
MIB = 2**20
# Sides and how much of them the plate fills: from the fewest points that can be inspected to a camera's megapixel.
SIZES = ((96, 0.4), (104, 0.36), (112, 0.34), (128, 0.34), (160, 0.3), (224, 0.3), (48, 0.8), (640, 0.2))
BAD = 0.1  # a plate of too few points


@dataclass(slots=True)
class Result:
    """What came of one half: rows of the table, and what is not as it was promised."""

    name: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def row(self, name: str, value: object) -> None:
        """Add a row."""
        self.rows.append((name, str(value)))

    def require(self, is_so: bool, told: str) -> None:
        """Note what is wrong."""
        if not is_so:
            self.wrong.append(told)

    def table(self) -> str:
        """For people, and for docs/reliability.md."""
        return "\n".join(
            [f"{self.name:34}", "-" * 34, *(f"{n:34} {v}" for n, v in self.rows), *self.wrong, ""]
        )


@dataclass(slots=True)
class Pace:
    """Numbers of frames, until there are enough or the time is over.

    Args:
        frames: at most.
        every: frames between two faults.
        minutes: at most; of None, as long as it takes.
    """

    frames: int
    every: int
    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[int]:
        for n in range(self.frames):
            if self.share(n) >= 1:
                return
            yield n

    def share(self, n: int) -> float:
        """How much of the run lies behind frame n."""
        past = 0.0 if self.minutes is None else (time.monotonic() - self.started) / 60 / self.minutes
        return max(n / self.frames, past)

    def turn(self, n: int) -> int:
        """The number of the fault before frame n, from 1 on; 0 where there is none."""
        return n // self.every if n % self.every == 0 else 0


@dataclass(slots=True)
class Memory:
    """Resident memory by process; a process that was started again is another one."""

    samples: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def look(self, name: str, pids: Sequence[int]) -> None:
        """Note what these processes, which live as long as the first of them, hold together."""
        with contextlib.suppress(psutil.NoSuchProcess):
            held = sum(psutil.Process(pid).memory_info().rss for pid in pids)
            self.samples.setdefault((name, pids[0]), []).append(held)

    def growth(self, name: str) -> tuple[float, float, int] | None:
        """MiB in the second and in the last quarter of the longest life, and its samples; None of too few."""
        lives = [held for (of, _), held in self.samples.items() if of == name]
        longest = max(lives, key=len, default=[])
        if len(longest) < LEAST_LOOKS:
            return None
        quarter = len(longest) // 4
        early, late = median(longest[quarter : 2 * quarter]), median(longest[-quarter:])
        return early / MIB, late / MIB, len(longest)

    def tell(self, result: Result, names: Sequence[str], most: float = 0.05) -> None:
        """Add rows, and what grew by more than `most`."""
        for name in names:
            if (grown := self.growth(name)) is None:
                result.row(f"memory of the {name}", "too short to tell")
                continue
            early, late, count = grown
            share = late / early - 1
            result.row(
                f"memory of the {name}",
                f"{early:.0f} MiB, then {late:.0f} MiB ({share:+.1%}) in {count * LOOK} frames without a restart",
            )
            result.require(share <= most, f"memory of the {name} grew by {share:.1%}")


def small_bundle(path: Path) -> Path:
    """The tests' two-block detector with random weights, exported for real."""
    write_bundle(make_tiny_detector(), make_input(1100), path, layouts=("fused",), parity_points=(1024,))
    return path


def frames(seed: int) -> list[Frame]:
    """A frame of each size."""
    return [make_frame(1000 * seed + i, size, part) for i, (size, part) in enumerate(SIZES)]


def key_of(found: Inspection) -> tuple[Any, ...]:
    """Everything of an inspection, so that two that differ in one bit differ."""
    maps = [None if m is None else hashlib.sha256(np.ascontiguousarray(m)).hexdigest() for m in _maps(found)]
    defects = json.dumps([defect.to_json() for defect in found.defects or ()])
    return found.score, found.verdict, *maps, defects


def _maps(found: Inspection) -> tuple[Any, Any]:
    return found.anomaly_map, found.score_maps


@contextlib.contextmanager
def serving(
    repository: Path, log: Path, program: Sequence[str | Path] = (BIN / "m3ad-triton",)
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`m3ad-triton serve` on free ports, with what it told; ended afterwards."""
    ports = [word for port in ("http", "grpc", "metrics", "health") for word in (f"--{port}-port", "0")]
    command = [*program, "serve", repository, *ports, "--json"]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            text = process.stdout.readline()
            assert text, log.read_text()
            yield process, json.loads(text)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def is_well(url: str) -> bool:
    """Whether /health says so."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.HTTPError, OSError):
        return False


def server_tree(serve: int) -> list[int]:
    """The server's process and its stages'; empty while it is started again."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for server in psutil.Process(serve).children():
            return [server.pid, *(p.pid for p in server.children(recursive=True))]
    return []


def hit(serve: int, stage: str, sent: signal.Signals) -> str:
    """Send a signal to a stage's process, or to the server itself where `stage` is empty; what was done."""
    tree = server_tree(serve)
    for pid in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if not stage or f"{stage}/1/" in " ".join(process.cmdline()):
                process.send_signal(sent)
                return f"{sent.name} of {'a stage' if stage else 'the server'}"
    return "nothing: the server is being started again"
