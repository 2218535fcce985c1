"""`m3ad-plugins gpu` without a GPU: what each step lacks, limits, failures, and what is written."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from m3ad_plugins import cli
from m3ad_plugins.cli import app
from m3ad_plugins.gpu import plan, report
from m3ad_plugins.gpu.steps import LACKS, Result, Step, run_step, run_steps
from typer.testing import CliRunner


def python(name: str, code: str, limit_s: float = 60, **more: str) -> Step:
    return Step(name, [sys.executable, "-c", code], limit_s, **more)


GOOD = python("good", "print('talk'); print('{\"rows held\": 3}')")


def test_steps_pass_fail_lack_and_say_nothing() -> None:
    told: list[int] = []
    steps = [
        GOOD,
        python("wrong", "import sys; sys.stderr.write('first\\nidx differs at 7\\n\\n'); sys.exit(3)"),
        python("lacks", f"import sys; sys.stderr.write('no CUDA device\\n'); sys.exit({LACKS})"),
        python("mute", "pass"),
        python("list", "print('[\"engines/native\"]')"),
        python("not here", "raise SystemExit(1)", lacks="not here: a GPU"),
        python("depends", "print('{}')", after="wrong"),
        python("follows", "print('{}')", after="good"),
        Step("no program", ["/nowhere/program"], 5),
    ]
    results = run_steps(steps, 100, lambda result, so_far: told.append(len(so_far)))
    assert [(r.name, r.state, r.said, r.figures) for r in results] == [
        ("good", "passed", "", {"rows held": 3}),
        ("wrong", "failed", "exit code 3: idx differs at 7", {}),
        ("lacks", "skipped", "no CUDA device", {}),
        ("mute", "failed", "its last line is no JSON document", {}),
        ("list", "passed", "", {"wrote": ["engines/native"]}),
        ("not here", "skipped", "not here: a GPU", {}),
        ("depends", "skipped", "it needs 'wrong', which did not pass", {}),
        ("follows", "passed", "", {}),
        ("no program", "failed", "/nowhere/program: No such file or directory", {}),
    ]
    assert told == [*range(1, 10)]


def ended(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # ended; nobody has asked for its exit code
        time.sleep(0.05)
    return False


def test_a_step_past_its_limit_ends_with_what_it_started(tmp_path: Path) -> None:
    started = tmp_path / "child"
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    result = run_step(python("slow", code), 3)
    assert (result.state, result.said) == ("out of time", "it took more than 3 s")
    assert ended(int(started.read_text()))


def test_all_steps_share_the_minutes() -> None:
    clock = iter([0.0, 0.0, 59.5])
    results = run_steps([GOOD, GOOD], 60, lambda *_: None, lambda: next(clock))
    assert [r.state for r in results] == ["passed", "skipped"]
    assert results[1].said == "the 1 minutes were over"


def test_report_is_written_whole_and_its_rows_hold_the_figures(tmp_path: Path) -> None:
    results = [
        Result("case table", "passed", 12.3, figures={"rows held": 120, "FPS ms": 0.21}),
        Result("enqueue", "failed", 1.0, "exit code 1: a | b"),
        Result("engines", "skipped", said="not here: tensorrt"),
        Result("frames", "passed", 2.0, figures={"forms": [{"p50_ms": 1}]}),
    ]
    path = tmp_path / "gpu.json"
    path.write_text("older")
    written = report.document("NVIDIA H100, 580.1, 9.0", results, ["/x/bin/m3ad-plugins", "gpu"])
    report.write_report(path, written)
    assert json.loads(path.read_text()) == written
    assert written["format"] == "m3ad-gpu-report 1"
    head, rows = path.with_suffix(".md").read_text().split("\n\n")
    assert head.startswith("NVIDIA H100, 580.1, 9.0; ")
    assert head.endswith("`m3ad-plugins gpu`:")
    assert rows.splitlines()[2:] == [
        "| case table | passed in 12 s | rows held 120, FPS ms 0.21 |",
        "| enqueue | failed in 1 s | exit code 1: a \\| b |",
        "| engines | skipped | not here: tensorrt |",
        "| frames | passed in 2 s | in the JSON document |",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_command_without_a_gpu_says_what_each_step_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "gpu_of_this_machine", lambda: "")
    monkeypatch.setenv("PATH", "")
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "gpu.json"), "--tensorrt", str(tmp_path)])
    assert str(done.exception) == "nothing was measured: no step could run on this machine"
    steps = {s["name"]: s for s in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert {s["state"] for s in steps.values()} == {"skipped"}
    gpu = "not here: an NVIDIA GPU that nvidia-smi answers for"
    assert steps["case table"]["said"] == f"{gpu}, nvcc of the CUDA toolkit 12 or 13"
    assert steps["enqueue"]["said"].startswith(
        f"{gpu}, nvcc of the CUDA toolkit 12 or 13, TensorRT's headers"
    )
    assert "compute-sanitizer of the CUDA toolkit" in steps["compute-sanitizer racecheck"]["said"]
    assert "a bundle (--bundle FOLDER)" in steps["engines of TensorRT"]["said"]


def test_a_step_that_fails_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = python("case table", "import sys; sys.exit('idx differs')")
    monkeypatch.setattr(cli, "gpu_steps", lambda *_: [GOOD, broken])
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "gpu.json")])
    assert str(done.exception) == f"case table did not pass; {tmp_path / 'gpu.json'} says why"
    monkeypatch.setattr(cli, "gpu_steps", lambda *_: [GOOD])
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "gpu.json")])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'gpu.json'} and {tmp_path / 'gpu.md'}\n")


def test_steps_are_told_what_was_given(tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "include").mkdir(parents=True)
    (given / "include" / "NvInferRuntime.h").touch()
    steps = {s.name: s for s in plan.gpu_steps("NVIDIA L4, 580.1, 8.9", tmp_path, given, given, given, given)}
    assert steps["enqueue"].command[-4:] == ["--tensorrt", str(given), "--architecture", "89"]
    assert "TensorRT's headers" not in steps["enqueue"].lacks
    assert steps["whole frame in PyTorch"].command[-2:] == ["--detector", str(given)]
    assert steps["engines of TensorRT"].command[3:] == [
        "build-engine",
        str(given),
        "--target",
        "native",
        "--json",
    ]
    bench = steps["frames by TensorRT in process"].command
    assert bench[3:] == [
        *("bench", str(given), "--bundle", str(given), "--frames", "20", "--json", "--runtime", "tensorrt")
    ]
    assert "frames (--data" not in steps["frames by TensorRT in process"].lacks
    unknown = {s.name: s for s in plan.gpu_steps("NVIDIA Jetson AGX Orin", tmp_path, given, None, None, None)}
    assert "--architecture" not in unknown["enqueue"].command
    every = {s.name for s in steps.values()}
    assert all(s.after in every or not s.after for s in steps.values())
