"""A station over real frames: each judged once, as `inspect` judges them, whatever goes wrong around."""

import csv
import errno
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from m3ad import cli as shared
from m3ad.bundle import Bundle, sha256_of
from m3ad.errors import ArtifactError, M3adError
from m3ad_client.cli import app
from m3ad_client.station import command, line, retention
from m3ad_client.station.config import read_config
from m3ad_client.station.sinks import files
from m3ad_client.station.station import Station
from m3ad_runtime.pipeline import Inspector
from PIL import Image
from rich.console import Console
from serving import make_frame, write_frame
from typer.testing import CliRunner
from watchfiles._rust_notify import WatchfilesRustInternalError


@contextmanager
def opened(path: Path) -> Iterator[tuple[Station, list[str]]]:
    said: list[str] = []
    station = Station(read_config(path), said.append)
    try:
        yield station, said
    finally:
        station.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "verdicts.jsonl").read_text().splitlines()]


def states(station: Station) -> list[str]:
    return [part.state for part in station.ledger.parts()]


def until(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass in 30 s")


def test_frames_are_judged_kept_and_told(
    settings: Callable[..., Path], put: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    digests = [sha256_of(path) for path in put(1)]
    put(2)
    put(3, part=0.1)  # too few points: cannot be inspected
    with opened(settings(camera="threshold = 0.0")) as (station, _):
        station.once()
        found = station.ledger.parts()
        assert [part.state for part in found] == ["judged", "judged", "fault"]
        setup = station.ledger.setup(int(found[0].setup or 0))
    assert list((tmp_path / "left").rglob("*.*")) == []
    first, second, bad = found
    inspector = Inspector(tiny_bundle, threads=1)
    inspector.limits = inspector.limits.moved(0.0)
    for seed, part in ((1, first), (2, second)):
        want = inspector.inspect(make_frame(seed), with_maps=True)
        assert part.score == pytest.approx(want.score, abs=1e-6)
        assert part.verdict == want.verdict == "defect"
        assert part.defects == json.loads(json.dumps([d.to_json() for d in want.defects or ()]))
        with np.load(tmp_path / "station" / str(part.maps)) as maps:
            np.testing.assert_allclose(maps["anomaly_map"], want.anomaly_map, atol=1e-6)
            np.testing.assert_allclose(maps["score_maps"], want.score_maps, rtol=2e-3, atol=1e-4)
            assert list(maps["names"]) == tiny_bundle.manifest.score_maps
        with Image.open(tmp_path / "station" / str(part.overlay)) as picture:
            assert picture.format == "PNG"
        kept = [p.stat().st_size for p in (tmp_path / "station" / "frames").rglob(f"{part.id:09}.*")]
        assert len(kept) == 4
        assert part.bytes == sum(kept)
    assert [first.rgb_sha256, first.xyz_sha256] == digests
    assert [sha256_of(tmp_path / "station" / name) for name in (first.rgb, first.xyz)] == digests
    assert "expected at least 1024" in str(bad.fault)
    assert setup["bundle_sha256"] == sha256_of(tiny_bundle.path / "manifest.json")
    assert setup["threshold_card"] == tiny_bundle.document["threshold"]
    assert setup["runtime"].startswith("ONNX Runtime ")
    told = lines(tmp_path)
    assert [(e["id"], e["part"], e["verdict"]) for e in told] == [
        (1, "001", "defect"),
        (2, "002", "defect"),
        (3, "003", None),
    ]
    assert told[0]["limits"] == {"reject": 0.0, "review": None}
    assert told[2]["fault"] == bad.fault
    with (tmp_path / "verdicts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["defect", "defect", ""]
    assert float(rows[0]["score"]) == first.score
    assert float(rows[0]["largest_mm2"]) == max(d["area_mm2"] for d in first.defects or ())


def test_a_frame_that_comes_again_is_not_judged_again(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> None:
    path = settings()
    put(1)
    with opened(path) as (station, _):
        station.once()
        put(1)
        station.once()
        put(2, name="001")  # the same name, another frame
        station.once()
        assert [part.name for part in station.ledger.parts()] == ["001", "001"]
        assert station.lines[0].again == 1
    assert len(lines(tmp_path)) == 2
    assert list((tmp_path / "left").rglob("*.*")) == []


def test_two_cameras_run_side_by_side_until_they_are_ended(
    settings: Callable[..., Path], put: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "right").mkdir()
    right = 'name = "right"\nfolder = "right"\ndone_marker = true\nthreads = 1'
    more = f'[[camera]]\n{right}\nbundle = "{tiny_bundle.path}"'
    before = threading.active_count()
    with opened(settings(more=more)) as (station, _):
        with station.running():
            for seed in range(3):
                put(seed)
                put(seed, camera="right")
                (tmp_path / "right" / f"{seed:03}.done").touch()
            until(lambda: states(station) == ["judged"] * 6)
            until(lambda: station.status()["queues"] == {})
        assert {
            camera: [p.name for p in station.ledger.parts("camera = ?", camera)]
            for camera in ("left", "right")
        } == {
            "left": ["000", "001", "002"],
            "right": ["000", "001", "002"],
        }
        assert station.status()["faults"] == {}
        assert list((tmp_path / "right").rglob("*.done")) == []
    assert threading.active_count() == before


def test_a_sink_that_is_down_holds_nobody_up(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "FIRST_WAIT_S", 0.02)
    (tmp_path / "verdicts.jsonl").mkdir()  # nobody can write there
    with opened(settings()) as (station, said):
        with station.running():
            for seed in range(3):
                put(seed)
            until(lambda: station.status()["queues"] == {"lines": {"waiting": 3, "dead": 0}})
            until(lambda: "sink lines" in station.status()["faults"])
            (tmp_path / "verdicts.jsonl").rmdir()
            until(lambda: station.status()["queues"] == {})
        assert states(station) == ["judged"] * 3
        assert station.status()["faults"] == {}
    assert [event["id"] for event in lines(tmp_path)] == [1, 2, 3]
    assert sum("verdicts wait and are sent again" in text for text in said) == 1
    assert said[-1] == "sink lines: well again"


def test_a_full_disk_costs_pictures_and_no_verdict(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    put(1)
    with opened(settings()) as (station, _):
        with monkeypatch.context() as patch:
            patch.setattr(line, "file_beside", full)
            station.once()
        put(2)
        station.once()
        first, second = station.ledger.parts()
    assert first.state == "judged"
    assert first.not_saved == f"{tmp_path / 'station'}: No space left on device"
    assert first.maps is None
    assert second.not_saved is None
    assert second.maps


def test_a_log_that_cannot_be_written_ends_no_thread(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that holds the log, too, once ended both cameras' threads and left the station waiting."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def unplugged() -> list[Any]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shared, "talk", Console(file=Full()))
    monkeypatch.setattr(line, "FIRST_WAIT_S", 0.02)
    station = Station(read_config(settings()), shared.say)
    (tmp_path / "verdicts.jsonl").mkdir()  # a fault of a sink, and one of the camera
    inbox = station.lines[0].inbox
    settled = inbox.settled
    try:
        with station.running():
            with monkeypatch.context() as patch:
                patch.setattr(inbox, "settled", unplugged)
                until(lambda: {"camera left"} <= station.status()["faults"].keys())
            inbox.settled = settled  # type: ignore[method-assign]
            put(1)
            until(lambda: states(station) == ["judged"])
            until(lambda: "sink lines" in station.status()["faults"])
            (tmp_path / "verdicts.jsonl").rmdir()
            until(lambda: station.status()["queues"] == {})
            assert station.ended() == []
    finally:
        station.close()


def test_a_folder_that_cannot_be_watched_is_looked_at(
    settings: Callable[..., Path], put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> Iterator[None]:
        raise WatchfilesRustInternalError("OS file watch limit reached")

    with opened(settings()) as (station, _):
        monkeypatch.setattr(station.watchfiles, "watch", no_room)
        with station.running():
            put(1)
            until(lambda: states(station) == ["judged"])
            assert station.ended() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_ends_the_station(
    settings: Callable[..., Path], put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody starts it again then; it once went on without its cameras."""

    def bug(_: line.Line) -> float:
        raise SystemExit

    monkeypatch.setattr(line.Line, "attempt", bug)
    monkeypatch.setattr(command.deploy, "WATCHDOG_S", 1)
    found = CliRunner().invoke(app, ["station", str(settings())])
    assert isinstance(found.exception, M3adError)
    assert re.match(r"camera left ended, which is a bug: .* start the station again", str(found.exception))


def test_a_ledger_that_is_full_keeps_the_frame_until_there_is_room(
    settings: Callable[..., Path], put: Callable[..., Any]
) -> None:
    put(1)
    with opened(settings()) as (station, said):
        (first,) = station.lines
        pages = station.ledger.query("PRAGMA page_count")[0][0]
        station.ledger.query(f"PRAGMA max_page_count = {pages}")
        first.inbox.settled()
        time.sleep(0.03)
        for _ in range(40):  # until the pages that are there are used up
            assert first.attempt() >= 0
            if first.failures:
                break
            put(_ + 10)
            first.inbox.settled()
            time.sleep(0.03)
        assert "database or disk is full" in station.status()["faults"]["camera left"]["why"]
        assert "frames are kept and tried again" in said[-1]
        station.ledger.query("PRAGMA max_page_count = 1000000")
        until(lambda: first.attempt() == first.pause_s() == 1.0)
        assert station.status()["faults"] == {}
        assert set(states(station)) == {"judged"}


def test_a_bug_costs_one_part_and_a_deadly_frame_is_tried_three_times(
    settings: Callable[..., Path], put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings()
    put(1)
    with opened(path) as (station, _), monkeypatch.context() as patch:
        patch.setattr(Inspector, "inspect", lambda *_, **__: 1 / 0)
        station.once()
        assert "ZeroDivisionError: division by zero (test_line.py" in str(station.ledger.parts()[0].fault)
    put(2)
    with opened(path) as (station, _):
        with monkeypatch.context() as patch:
            patch.setattr(Inspector, "inspect", lambda *_, **__: sys.exit(9))
            with pytest.raises(SystemExit):
                station.once()
        assert states(station) == ["fault", "taken"]
    for _ in range(2):  # as a process that dies at this frame: it starts, and nothing is written
        with opened(path) as (station, _):
            pass
    with opened(path) as (station, _):
        station.once()
        assert "the station ended 3 times while it judged this frame" in str(station.ledger.parts()[1].fault)


def test_a_frame_that_was_replaced_before_it_was_judged_is_told_of(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> None:
    with opened(settings()) as (station, _):
        old, new = put(1), make_frame(2)
        hashes = (sha256_of(old[0]), sha256_of(old[1]))
        station.ledger.take(camera="left", name="001", sources=old, hashes=hashes, size=1)
        write_frame(tmp_path / "left", "001", new)
        station.once()
        lost, found = station.ledger.parts()
    assert lost.fault == f"{old[0]} was removed or replaced before it was judged"
    assert found.state == "judged"


def test_two_stations_do_not_share_a_folder(settings: Callable[..., Path], tmp_path: Path) -> None:
    path = settings()
    with opened(path), pytest.raises(ArtifactError, match=r"another station uses .*; end it"):
        Station(read_config(path), print)
    (tmp_path / "left" / "rgb").rmdir()
    (tmp_path / "left").rmdir()
    with pytest.raises(ArtifactError, match=r"camera left: .* is not a folder; make it"):
        Station(read_config(path), print)


def test_pictures_go_by_age_and_size_and_verdicts_stay(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> None:
    for seed in range(4):
        put(seed)
    with opened(settings()) as (station, _):
        station.once()
        ledger, store = station.ledger, station.settings.store
        parts = ledger.parts()
        ledger.say(1, "good", "ann")
        assert retention.tidy(ledger, store) == 0
        room = (parts[3].bytes + parts[0].bytes + 10) / 2**30
        small = type(store)(folder=store.folder, keep_gib=room)
        assert retention.tidy(ledger, small) == 2
        # The oldest goes first, but one that somebody reviewed goes last.
        assert [part.pictures for part in ledger.parts()] == [True, False, False, True]
        assert retention.tidy(ledger, store, now=time.time() + 31 * 86_400) == 2
        assert [part.verdict is not None for part in ledger.parts()] == [True] * 4
    assert list((tmp_path / "station" / "frames").rglob("*.*")) == []


def test_half_a_line_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.jsonl"
    sink = files.json_lines(path)
    sink.send({"id": 1})
    with path.open("a") as file:
        file.write('{"id": 2, "tor')  # a writer that was killed
    sink.send({"id": 2})
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        sink.send({"id": 3})
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n'
    path.write_text("x" * 9000)  # no line end at all
    monkeypatch.undo()
    sink.send({"id": 4})
    assert path.read_text() == '{"id": 4}\n'
