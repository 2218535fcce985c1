"""Bundles made on the way: `m3ad-export train` and `bundle` as a user would run them, with a reduced training.

This room knows no PyTorch; the commands run in processes of their own.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from m3ad.errors import M3adError, MissingDependencyError
from m3ad.frames import find_samples, read_sample
from m3ad.methods import METHODS

LOG = "prepare.log"
CORNER = 2  # pixels of a side; the least that a method lays its background through


def export_command() -> str:
    """Where `m3ad-export` is: beside this Python, or on the path.

    Raises:
        MissingDependencyError: it is not installed.
    """
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which("m3ad-export", path=places)
    if found is None:
        raise MissingDependencyError(
            "--prepare trains with m3ad-export, which is not installed here: pip install 'm3ad[export]'"
        )
    return found


def prepare_bundle(
    method: str, data: Path, folder: Path, say: Callable[[str], None], command: str | None = None
) -> Path:
    """Train a method on a category with few steps and export it.

    A method that lays a background through the frames' corners takes none away where one was not measured.

    Args:
        method: one of `m3ad.methods.METHODS`; its `reduced` settings are taken.
        data: a category with train and validation splits.
        folder: gets `detector/`, `bundle/` and `prepare.log`; an interrupted training there goes on.
        say: is told of each step.
        command: of m3ad-export, found when left out.

    Returns:
        The bundle's folder.

    Raises:
        M3adError: a command failed; the message ends in its own.
    """
    export = command or export_command()
    folder.mkdir(parents=True, exist_ok=True)
    detector, bundle = folder / "detector", folder / "bundle"
    settings = [
        part for name, value in METHODS[method].reduced.items() for part in ("--set", f"{name}={value}")
    ]
    steps = (
        ("train", str(data), str(detector), "--method", method, *settings, *_plane(method, data)),
        ("bundle", str(detector), str(bundle), "--data", str(data)),
    )
    log = folder / LOG
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            say(f"{METHODS[method].title}: m3ad-export {' '.join(step)}")
            done = subprocess.run([export, *step], stdout=file, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                file.flush()
                raise M3adError(f"m3ad-export {step[0]} failed: {_reason(log)} ({log})")
    return bundle


def _plane(method: str, data: Path) -> tuple[str, ...]:
    """`--plane none` where the method's own plane cannot be laid through a frame to train on."""
    if METHODS[method].plane != "corners":
        return ()
    frames = (read_sample(sample) for sample in find_samples(data, "train"))
    return () if all(_has_corners(frame.xyz) for frame in frames) else ("--plane", "none")


def _has_corners(xyz: npt.NDArray[np.float32]) -> bool:
    """Whether something was measured in each corner of [H, W, 3] in metres, (0, 0, 0) where nothing was."""
    ends = slice(CORNER), slice(-CORNER, None)
    return all(xyz[rows, columns, 2].any() for rows in ends for columns in ends)


def _reason(log: Path) -> str:
    """What the command said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or [line for line in lines if line] or ["it said nothing"])[-1]
