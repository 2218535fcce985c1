"""Drift of a running line: its reason is named, comes once, goes once, and is told to everybody."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drifting import WAYS, plate
from m3ad.bundle import Bundle
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.reference import Looks, score_band
from m3ad_calibrate.cli import app
from m3ad_client.station import drift
from m3ad_client.station.config import Camera, read_config
from m3ad_client.station.drift import Drift
from m3ad_client.station.faults import Faults
from m3ad_client.station.station import Station
from serving import write_frame
from stations import PAGE, TOKEN
from typer.testing import CliRunner

SCORES = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03, 0.97]


class Clock:
    """Each look comes a second after the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def looks() -> Looks:
    found = Looks(Preprocessing())
    for seed in range(8):
        found.add(plate(seed))
    return found


@pytest.fixture
def watched(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., None], Drift, list[str]]:
    for name, value in (("WINDOW", 8), ("LEAST", 4), ("PATIENCE", 3)):  # a quarter: looking takes its time
        monkeypatch.setattr(drift, name, value)
    said: list[str] = []
    clock = Clock()
    opened = Drift("left", Faults(said.append), looks.reference(), score_band(SCORES, 2.0), clock=clock)
    seeds = iter(range(1000, 10_000))

    def run(
        count: int, change: Callable[[Frame], Frame] = lambda frame: frame, score: float | None = 1.0
    ) -> None:
        for _ in range(count):
            clock.now += 1.0
            opened.add(change(plate(next(seeds))), score)

    return run, opened, said


@pytest.mark.parametrize("way", ["darker", "image moved"])
def test_an_alarm_names_its_reason_comes_once_and_goes_once(
    way: str, watched: tuple[Callable[..., None], Drift, list[str]]
) -> None:
    run, opened, said = watched
    reason, change = WAYS[way]
    run(9)
    assert (said, opened.alarms) == ([], set())
    run(9, change, score=1.6)  # what moves a frame moves its score, too
    assert opened.alarms == {reason}
    assert opened.shares[reason] > 1  # type: ignore[index]
    assert [text.partition(":")[0] for text in said] == [f"drift left {reason}"]
    run(9)
    assert opened.alarms == set()
    assert said[1:] == [f"drift left {reason}: well again"]


def test_scores_that_nothing_explains_are_a_reason_of_their_own(
    watched: tuple[Callable[..., None], Drift, list[str]],
) -> None:
    run, opened, said = watched
    run(4)
    run(9, score=1.6)
    assert opened.alarms == {"score"}
    assert said == [
        "drift left score: scores are 1.6, 1 is usual, and nothing else explains it (median of 8 frames)"
    ]
    run(9, WAYS["blurred"][1], score=1.6)
    assert opened.alarms == {"focus"}  # now something does
    assert said[-1] == "drift left score: well again" or said[-2] == "drift left score: well again"


def test_frames_that_come_fast_are_not_all_looked_at(looks: Looks) -> None:
    clock = Clock()
    opened = Drift("left", Faults(lambda _: None), looks.reference(), clock=clock)
    for _ in range(40):
        clock.now += 0.25
        opened.add(plate(1), None)
    assert len(opened._window) == 10


def test_a_station_tells_drift_to_log_page_metrics_and_sinks(
    settings: Callable[..., Path], tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WINDOW", 4), ("LEAST", 3), ("EVERY_S", 0.0)):
        monkeypatch.setattr(drift, name, value)
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    for seed in range(6):
        write_frame(tmp_path / "data" / "validation" / "good", f"{seed:03}", plate(seed))
    command = ["threshold", str(bundle), "--data", str(tmp_path / "data"), "--plot", str(tmp_path / "t.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    path = settings(more=PAGE)
    path.write_text(path.read_text().replace(str(tiny_bundle.path), str(bundle)))
    (tmp_path / "token").write_text(TOKEN)
    reason, change = WAYS["darker"]
    for number in range(12):
        frame = plate(100 + number)
        write_frame(tmp_path / "left", f"{number:03}", change(frame) if number >= 6 else frame)
    said: list[str] = []
    station = Station(read_config(path), said.append)
    try:
        while len(station.ledger.parts("state = 'judged'")) < 12:
            station.lines[0].step()
        while not station.deliverers[0].attempt():
            pass
        now = station.status()
        assert [*now["faults"]] == [f"drift left {reason}"]
        assert now["cameras"]["left"]["drift"][reason] > 1
    finally:
        station.close()
    assert [text for text in said if text.startswith("drift")] == [
        f"drift left brightness: {now['faults']['drift left brightness']['why']}"
    ]
    told = [json.loads(text) for text in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    names = [event["drift"] for event in told]
    assert names[:6] == [[]] * 6
    assert names[-1] == ["brightness"]
    first = names.index(["brightness"])
    assert names == [[]] * first + [["brightness"]] * (12 - first)


def test_a_bundle_without_a_reference_is_told_of(tiny_bundle: Bundle) -> None:
    said: list[str] = []
    camera = Camera(name="left", folder=Path("left"), bundle=tiny_bundle.path)
    opened = Drift.of(camera, Faults(said.append))
    opened.add(plate(0), 1.0)
    assert opened.shares == {}
    assert said == [
        f"camera left: drift is not watched, {tiny_bundle.path} does not say how its calibration frames look; record "
        f"it: m3ad-calibrate threshold {tiny_bundle.path} --data DATA"
    ]
    Drift.of(Camera(name="right", folder=Path("right"), url="localhost:1"), Faults(said.append))
    assert said[1] == "camera right: drift is not watched; name the served bundle as its `reference`"


def test_a_bug_in_looking_costs_no_verdict(
    settings: Callable[..., Path], put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(1)
    monkeypatch.setattr(Drift, "add", lambda *_: np.zeros(2)[9])
    station = Station(read_config(settings()), lambda _: None)
    try:
        while not station.ledger.parts("state = 'judged'"):
            station.lines[0].step()
        assert "IndexError" in station.status()["faults"]["drift left"]["why"]
    finally:
        station.close()
