"""A served line under load: clients that ask all the time, and stages that are killed, stopped, hung and made wrong.

What hangs or answers wrong does so in the process alone: whoever starts it again has a good one. `heal_under_load.py`
makes a table of it.
"""

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from m3ad.errors import M3adError
from m3ad.frames import Frame
from m3ad_client.triton import TritonInspector
from m3ad_triton.repository import write_repository
from serving import make_frame, rehash
from soak_parts import hit, is_well, key_of, serving

Fault = Literal["SIGKILL", "SIGSTOP", "hang", "corrupt"]
FAULTS: tuple[Fault, ...] = ("SIGKILL", "SIGSTOP", "hang", "corrupt")
STAGES = ("prepare", "admit", "rgb_extractor", "xyz_extractor", "head", "judge")
CLIENTS, RETRIES, LONGEST_S = 4, 12, 300.0
SIZES = ((96, 0.4), (112, 0.34), (128, 0.34), (160, 0.3))
# The command itself, without its look at model.py, which may hold nothing but what m3ad writes.
SERVE = "import m3ad_triton.cli as c; c.verify_repository = lambda *a, **k: None; c.app()"
# For a stage's model.py: at the next request after a file FOLDER/hang_STAGE or corrupt_STAGE was made.
FAULTY = """
import time
from pathlib import Path

import {module} as own

folder, stage, answer, wrong = Path({folder!r}), {stage!r}, own.answer, []


def taken(fault):
    try:
        (folder / f"{{fault}}_{{stage}}").unlink()
    except FileNotFoundError:
        return False
    return True


def faulty(request, inputs, function):
    def results(arrays):
        if taken("hang"):
            time.sleep(1e6)
        if taken("corrupt"):
            wrong.append(True)
        found = function(arrays)
        return {{n: a * a.dtype.type(1.25) if wrong and a.dtype.kind == "f" else a for n, a in found.items()}}

    return answer(request, inputs, results)


own.answer = faulty
TritonPythonModel = own.{name}
"""


def write_faulty(bundle: Path, folder: Path) -> Path:
    """The fused repository of a bundle of category `tiny`, whose stages take the faults of files in `folder`."""
    repository = folder / "repository"
    write_repository(bundle, repository, "onnxruntime", "fused")
    for stage in STAGES:
        around = {"prepare": "Prepare", "admit": "Admit", "judge": "Judge"}.get(stage)
        module = "m3ad_triton.frame_models" if around else "m3ad_triton.stage_model"
        text = FAULTY.format(
            module=module, folder=str(folder), stage=stage, name=around or "TritonPythonModel"
        )
        (repository / f"tiny_{stage}" / "1" / "model.py").write_text(text)
    rehash(repository)
    return repository


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was told: when, and whether it was right; `refusal` where it was a sentence."""

    client: int
    at: float
    right: bool
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a fault. Times in seconds after it.

    Attributes:
        noticed_s: when readiness was false; None where it never was.
        ready_s: when it was true again.
        served_s: when each client had a right answer again.
        wrong: answers that were not right, until readiness was true again.
        wrong_after: the same, afterwards.
        refused: requests that failed although they were tried again.
    """

    stage: str
    fault: Fault
    noticed_s: float | None
    ready_s: float
    served_s: float
    wrong: int
    wrong_after: int
    refused: int


@dataclass(slots=True)
class Load:
    """Clients of a served line, two at each door, and what they were told."""

    serve: int
    url: str
    health: str
    folder: Path
    answers: list[Answer] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _right: dict[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)

    def fault(self, stage: str, fault: Fault, settle_s: float = 2.0) -> Outcome:
        """Let a stage (of "", the server) have a fault, and wait until all is well again."""
        before = len(self.answers)
        self._wait(lambda: {a.client for a in self.answers[before:] if a.right} == {*range(CLIENTS)})
        time.sleep(settle_s)
        begun, started = len(self.answers), time.monotonic()
        if fault in ("hang", "corrupt"):
            (self.folder / f"{fault}_{stage}").touch()
        else:
            hit(self.serve, f"tiny_{stage}" if stage else "", getattr(signal, fault))
        noticed = ready = None
        while ready is None or not self._all_served(started + ready):
            past = time.monotonic() - started
            assert past < LONGEST_S, f"{fault} of {stage} is not healed"
            well = is_well(self.health)
            if noticed is None and not well:
                noticed = past
            elif noticed is not None and ready is None and well:
                ready = past
            time.sleep(0.02)
        served = max(self._first_right(client, started + ready) for client in range(CLIENTS)) - started
        found = self.answers[begun:]
        wrong = [a for a in found if not a.right and not a.refusal]
        late = [a for a in wrong if a.at > started + ready]
        refused = sum(bool(a.refusal) for a in found)
        return Outcome(stage, fault, noticed, ready, served, len(wrong) - len(late), len(late), refused)

    def _all_served(self, since: float) -> bool:
        return all(self._first_right(client, since) < float("inf") for client in range(CLIENTS))

    def _first_right(self, client: int, since: float) -> float:
        return min(
            (a.at for a in self.answers if a.client == client and a.right and a.at > since),
            default=float("inf"),
        )

    def _wait(self, done: Any) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not done():
            assert time.monotonic() < deadline, self.answers[-4:]
            time.sleep(0.02)

    def _ask(self, client: int, frames: list[Frame]) -> None:
        door = ("frames", "tensors")[client % 2]
        with TritonInspector(self.url, "tiny", retries=RETRIES) as inspector:
            for index in itertools.cycle(range(len(frames))):
                if self._done.is_set():
                    return
                try:
                    ask = inspector.inspect_frame if door == "frames" else inspector.inspect_by_tensors
                    right, refusal = key_of(ask(frames[index])) == self._right[door, index], ""
                except M3adError as error:
                    right, refusal = False, str(error)
                self.answers.append(Answer(client, time.monotonic(), right, refusal))


@contextlib.contextmanager
def loaded(bundle: Path, folder: Path) -> Iterator[Load]:
    """`m3ad-triton serve` of a bundle of category `tiny` with clients that ask all the time."""
    frames = [make_frame(i, size, part) for i, (size, part) in enumerate(SIZES)]
    program = (sys.executable, "-c", SERVE)
    with serving(write_faulty(bundle, folder), folder / "serve.log", program) as (serve, told):
        url, health = str(told["grpc_url"]), str(told["health_url"])
        load = Load(serve.pid, url, health, folder)
        with TritonInspector(url, "tiny") as inspector:
            for index, frame in enumerate(frames):
                load._right["frames", index] = key_of(inspector.inspect_frame(frame))
                load._right["tensors", index] = key_of(inspector.inspect_by_tensors(frame))
        threads = [threading.Thread(target=load._ask, args=(i, frames), daemon=True) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield load
        finally:
            load._done.set()
            for thread in threads:
                thread.join(5)
