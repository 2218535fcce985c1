"""Steps that each run as a process of their own: none outlives its limit, and none takes the others with it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

LACKS = (
    77  # exit code of a step that finds only when it runs that the machine lacks something; automake's, too
)
State = Literal["passed", "failed", "out of time", "skipped"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to prove.

    Attributes:
        name: as it is reported.
        command: its last line is one JSON document, its figures or what it wrote; it ends with 0 if all is well, with
            `LACKS` if it finds that the machine lacks something.
        limit_s: seconds it may take.
        lacks: what this machine has not got for it, in one sentence; empty if it can run.
        after: the step that must have passed before.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    lacks: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """How a step went: `said` is one sentence where it did not pass."""

    name: str
    state: State
    seconds: float = 0.0
    said: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def run_steps(
    steps: Sequence[Step],
    total_s: float,
    tell: Callable[[Result, Sequence[Result]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Run the steps in their order.

    Args:
        steps: what to run.
        total_s: seconds that all of them may take together.
        tell: gets each result as it comes, and all so far.
        clock: seconds since any moment.
    """
    started = clock()
    results: list[Result] = []
    for step in steps:
        left = total_s - (clock() - started)
        states = {r.name: r.state for r in results}
        if step.lacks:
            result = Result(step.name, "skipped", said=step.lacks)
        elif step.after and states.get(step.after) != "passed":
            result = Result(step.name, "skipped", said=f"it needs '{step.after}', which did not pass")
        elif left < 1:
            result = Result(step.name, "skipped", said=f"the {total_s / 60:.0f} minutes were over")
        else:
            result = run_step(step, min(step.limit_s, left))
        results.append(result)
        tell(result, results)
    return results


def run_step(step: Step, limit_s: float) -> Result:
    """Run one step; a process that takes longer is ended with all that it has started."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Result(step.name, "failed", said=f"{step.command[0]}: {error.strerror}")
    try:
        said, wrong = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        process.communicate()
        seconds = time.monotonic() - started
        return Result(step.name, "out of time", round(seconds, 1), f"it took more than {limit_s:.0f} s")
    except BaseException:  # Ctrl-C: the step is in a session of its own and would go on
        _end(process)
        raise
    _end(process)  # what it left behind
    seconds = round(time.monotonic() - started, 1)
    if process.returncode != 0:
        lines = [line.strip() for line in (wrong.strip() or said.strip()).splitlines() if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        if process.returncode == LACKS:
            return Result(step.name, "skipped", seconds, last[:300])
        return Result(step.name, "failed", seconds, f"exit code {process.returncode}: {last[:300]}")
    try:
        found = json.loads(said.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return Result(step.name, "failed", seconds, "its last line is no JSON document")
    return Result(
        step.name, "passed", seconds, figures=found if isinstance(found, dict) else {"wrote": found}
    )


def _end(process: "subprocess.Popen[str]") -> None:
    """End the process group of a step, whether its first process has ended or not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
