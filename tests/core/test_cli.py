"""What the four commands do with a path that the system refuses: one sentence that names it, and nothing written."""

import sys
from pathlib import Path

import pytest
from m3ad.bundle import Bundle
from m3ad.cli import run
from m3ad_calibrate.cli import app as calibrate
from m3ad_client.cli import app as client
from m3ad_export.cli import app as export
from m3ad_triton.cli import app as triton
from serving import make_frame, write_frame
from typer import Typer


def outcome(app: Typer, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["m3ad", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(app)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("place", ["afile", "afile/below", "/proc/results"])
@pytest.mark.parametrize("command", ["infer", "write", "rig", "sample-data", "train"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    command: str,
    place: str,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "afile").write_text("mine")
    out = str(tmp_path / place)  # an absolute place stays as it is
    for number in range(2):
        write_frame(tmp_path / "frames", f"{number:03}", make_frame(number, part=1.0))
    frames = str(tmp_path / "frames")
    app, arguments = {
        "infer": (client, ["infer", frames, "--bundle", str(tiny_bundle.path), "--out", out]),
        "write": (triton, ["write", str(tiny_bundle.path), out]),
        "rig": (calibrate, ["rig", "--data", frames, "--out", f"{out}/rig.json"]),
        "sample-data": (export, ["sample-data", out]),
        "train": (export, ["train", frames, out, "--rgb-weights", "random"]),
    }[command]
    assert outcome(app, arguments, monkeypatch) == 1
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert place.split("/")[0 if place[0] != "/" else 1] in line
    assert "/." not in line  # the place that was named, not a temporary one
    assert "Traceback" not in told.err
    assert "score" not in told.out  # no frame was inspected
    assert (tmp_path / "afile").read_text() == "mine"


def test_an_error_of_the_system_that_names_no_path_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = Typer()

    @app.command()
    def broken() -> None:
        raise OSError("a bug")

    monkeypatch.setattr(sys, "argv", ["m3ad"])
    with pytest.raises(OSError, match="a bug"):
        run(app)
