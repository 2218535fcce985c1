"""Frames of all sizes asked of one process, and of a served line that heals, with a fault every so many frames.

What a frame gave the first time, bit for bit (score, map, score maps, defects), it must give for ever, or be refused by
a sentence.
"""

import itertools
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import soak_parts as parts
import tritonclient.grpc as grpcclient
from m3ad.bundle import Bundle
from m3ad.errors import FrameError, M3adError
from m3ad.frame_door import RGB, XYZ
from m3ad.frames import Frame
from m3ad_client.infer import AnyInspector
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from serving import make_frame
from tritonclient.utils import np_to_triton_dtype

HEAL_S = 120.0


class Asked:
    """Who asks, and remembers the first answers."""

    def __init__(self, result: parts.Result, seed: int) -> None:
        self.result, self.pool = result, parts.frames(seed)
        self.first: dict[int, tuple[Any, ...]] = {}
        self.faults: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.asked = self.other = self.right = 0

    def ask(self, inspector: AnyInspector, number: int) -> None:
        """Ask for a frame, with score maps now and then, and hold the answer against the first."""
        self.asked += 1
        index, with_maps = number % len(self.pool), number // len(self.pool) % 3 == 0
        try:
            found = inspector.inspect(self.pool[index], with_maps=with_maps)
        except M3adError as error:
            self.refused[str(error).partition("(")[0][:70]] += 1
            self.result.require(str(error).isprintable(), f"no sentence: {error!r}")
            return
        same = self.first.setdefault(2 * index + with_maps, parts.key_of(found)) == parts.key_of(found)
        self.right, self.other = self.right + same, self.other + (not same)

    def ask_bad(self, inspector: AnyInspector) -> str:
        """A frame of too few points, which must be refused."""
        try:
            inspector.inspect(make_frame(1, 64, parts.BAD))
        except FrameError:
            return "bad frame, refused by a sentence"
        self.result.wrong.append("a bad frame was not refused")
        return "bad frame, not refused"

    def tell(self) -> parts.Result:
        """The rows."""
        result = self.result
        result.row("frames", f"{self.asked} of {len(self.pool)} sizes")
        result.row("faults", sum(self.faults.values()))
        for name, count in sorted(self.faults.items()):
            result.row(f"  {name}", count)
        result.row("right / refused / wrong", f"{self.right} / {sum(self.refused.values())} / {self.other}")
        for told, count in self.refused.most_common(4):
            result.row(f"  refused {count} x", told)
        result.require(self.other == 0, f"{self.other} answers differ from the first")
        return result


def in_process(bundle: Path, pace: parts.Pace, seed: int) -> parts.Result:
    """The detector in this process; faults are bad frames and a detector that is opened anew."""
    asked, memory, own = Asked(parts.Result("in process"), seed), parts.Memory(), psutil.Process().pid
    inspector: AnyInspector = Inspector(Bundle.open(bundle), threads=1)
    for n in pace:
        if turn := pace.turn(n):
            if turn % 2:
                told = asked.ask_bad(inspector)
            else:
                inspector, told = Inspector(Bundle.open(bundle), threads=1), "opened anew"
            asked.faults[told] += 1
        asked.ask(inspector, n)
        if n % 10 == 9:
            memory.look("process", [own])
    asked.tell()
    memory.tell(asked.result, ["process"])
    return asked.result


def served(folder: Path, bundle: Path, pace: parts.Pace, seed: int) -> parts.Result:
    """A real server under `m3ad-triton serve`, whose stages and itself are killed and stopped."""
    asked, memory, own = Asked(parts.Result("served"), seed), parts.Memory(), psutil.Process().pid
    repository = folder / "repository"
    write_repository(bundle, repository, "onnxruntime", "fused")
    with parts.serving(repository, folder / "serve.log") as (serve, told):
        url, health = str(told["grpc_url"]), f"http://{str(told['health_url']).removeprefix('http://')}"
        with TritonInspector(url, retries=12) as inspector:
            stages = itertools.cycle(("tiny_head", "tiny_rgb_extractor", "tiny_judge", "tiny_xyz_extractor"))
            faults: list[Callable[[], str]] = [
                lambda: "stage: " + parts.hit(serve.pid, next(stages), signal.SIGKILL),
                lambda: asked.ask_bad(inspector),
                lambda: _cancelled(url, asked.pool[0]),
                lambda: "stage: " + parts.hit(serve.pid, next(stages), signal.SIGSTOP),
                lambda: _reloaded(repository, bundle),
                lambda: parts.hit(serve.pid, "", signal.SIGKILL),
                lambda: _cancelled(url, asked.pool[0]),
                lambda: asked.ask_bad(inspector),
            ]
            for n in pace:
                if turn := pace.turn(n):
                    asked.faults[faults[(turn - 1) % len(faults)]()] += 1
                asked.ask(inspector, n)
                if n % 10 == 9:
                    memory.look("client", [own])
                    memory.look("supervisor (m3ad-triton serve)", [serve.pid])
                    if tree := parts.server_tree(serve.pid):
                        memory.look("server with its stages", tree)
        end = time.monotonic() + HEAL_S
        while not parts.is_well(health):
            if time.monotonic() > end:
                asked.result.wrong.append(f"the line is not well {HEAL_S:.0f} s after the last frame")
                break
            time.sleep(0.2)
    asked.tell()
    memory.tell(asked.result, ["client", "supervisor (m3ad-triton serve)", "server with its stages"])
    return asked.result


def _cancelled(url: str, frame: Frame) -> str:
    """Ten requests that nobody waits for."""
    with grpcclient.InferenceServerClient(url) as client:
        inputs = []
        for name, array in ((RGB.name, frame.rgb), (XYZ.name, frame.xyz)):
            inputs.append(grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        for _ in range(10):
            client.async_infer("tiny", inputs, lambda **_: None).cancel()
    return "ten requests sent and cancelled"


def _reloaded(repository: Path, bundle: Path) -> str:
    """The repository written again and taken up."""
    write_repository(bundle, repository, "onnxruntime", "fused")
    done = subprocess.run(
        [parts.BIN / "m3ad-triton", "reload", repository], capture_output=True, text=True, check=False
    )
    return "reload" if done.returncode == 0 else f"reload refused: {done.stderr.strip()[:60]}"
