"""Whoever is killed, runs out of room or writes beside: a target is there whole, and nothing stays beside it."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from m3ad.atomic import locked
from m3ad.bundle import MANIFEST, Bundle, new_folder, write_json
from m3ad.errors import ArtifactError
from m3ad_export.checkpoints import save_checkpoint
from serving import make_frame, write_frame

WRITER = """
import sys, time
from pathlib import Path
import typer
from m3ad.bundle import new_folder, write_json
from m3ad.cli import run

app = typer.Typer()

@app.command()
def write(target: Path, seconds: float):
    for number in range(100 if seconds == 0 else 1):
        with new_folder(target, "m3ad-test") as folder:
            write_json(folder / "manifest.json", {"format": "m3ad-test", "number": number})
            print(folder, flush=True)
            time.sleep(seconds)

run(app)
"""


def writer(target: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def write(target: Path, number: int = 0) -> None:
    with new_folder(target, "m3ad-test") as folder:
        write_json(folder / MANIFEST, {"format": "m3ad-test", "number": number})


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def small_files(bytes_each: int) -> Callable[[], None]:
    """A disk with no room, as far as a process can tell."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_each, bytes_each))


@pytest.mark.parametrize(
    ("ending", "code", "stays"), [(signal.SIGKILL, -9, True), (signal.SIGTERM, 143, False)]
)
def test_what_a_killed_writer_leaves_is_removed_by_the_next(
    tmp_path: Path, ending: signal.Signals, code: int, stays: bool
) -> None:
    target = tmp_path / "repo"
    write(target)
    process = writer(target, 60)
    assert process.stdout
    with process.stdout:
        left = Path(process.stdout.readline().strip())
        assert left.is_dir()
        write(target, 1)
        assert left.is_dir()  # its writer lives
        process.send_signal(ending)
        assert process.wait(20) == code
    assert left.exists() is stays
    (tmp_path / ".repo.mine").mkdir()
    write(target, 2)
    assert sorted(os.listdir(tmp_path)) == [".repo.mine", "repo"]
    assert json.loads((target / MANIFEST).read_text())["number"] == 2


def test_a_target_is_there_while_it_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "repo"
    write(target)
    process = writer(target, 0)
    seen = set()
    assert process.stdout
    with process.stdout:
        while process.poll() is None:
            seen.add(json.loads((target / MANIFEST).read_text())["number"])
            process.stdout.readline()
    assert len(seen) > 10


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "repository"
    done = subprocess.run(
        [command("m3ad-triton"), "write", str(tiny_bundle.path), str(target)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small_files(20_000),
    )
    told = f"error: {target} cannot be written (File too large); make room there, or name another folder\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_says_so(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint({"weight": torch.zeros(100_000)}, tmp_path / "detector.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert os.listdir(tmp_path) == []


def test_verdicts_are_told_where_nothing_can_be_saved(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for number in range(2):
        write_frame(tmp_path / "frames", f"{number:03}", make_frame(number))
    out = tmp_path / "out"
    arguments = ["infer", str(tmp_path / "frames"), "--bundle", str(tiny_bundle.path), "--out", str(out)]
    for room, saved in ((200_000, 2), (1000, 0)):  # the overlay alone fits; neither does
        done = subprocess.run(
            [command("m3ad-client"), *arguments, "--json"],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=small_files(room),
        )
        found = json.loads(done.stdout)["frames"]
        assert [frame["not_saved"] for frame in found] == [f"{out}: File too large"] * 2
        assert all(frame["score"] > 0 and frame["verdict"] for frame in found)
        assert done.returncode == 1
        assert (
            f"error: what was found in 2 of 2 frames could not be saved: {out}: File too large" in done.stderr
        )
        assert len(os.listdir(out)) == saved
        shutil.rmtree(out)


def test_overlapping_updates_are_both_kept_or_one_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, path)
    first, second, third = (Bundle.open(path) for _ in range(3))
    first.update(threshold={"value": 0.5})
    second.update(svm={"note": "kept"})
    with pytest.raises(
        ArtifactError, match=r"another program changed `threshold` .* nothing was written; run"
    ):
        third.update(threshold={"value": 0.7})
    last = Bundle.open(path)
    assert (last.manifest.threshold.value, last.manifest.svm) == (0.5, {"note": "kept"})
    files = {name: entry for name, entry in last.document["files"].items() if name.startswith("onnx")}
    write_json(path / MANIFEST, {**last.document, "files": files})
    with pytest.raises(ArtifactError, match="another program changed `files`"):
        last.update(gate={"passed": True})
    assert "gate" not in json.loads((path / MANIFEST).read_text())


def test_a_lock_is_waited_for_also_when_its_folder_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write(target)
    script = "import sys; from pathlib import Path; from m3ad.atomic import locked\n"
    script += "print('asks', flush=True)\nwith locked(Path(sys.argv[1])): print('has it', flush=True)"
    with locked(target):
        waiting = subprocess.Popen(
            [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True
        )
        assert waiting.stdout
        assert waiting.stdout.readline() == "asks\n"
        time.sleep(0.2)
        assert waiting.poll() is None
        write(target, 1)
        held = os.open(target, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    time.sleep(0.2)
    assert waiting.poll() is None  # it got the old folder's lock, which counts no more
    os.close(held)
    with waiting.stdout as told:
        assert told.read() == "has it\n"
    assert waiting.wait(10) == 0
