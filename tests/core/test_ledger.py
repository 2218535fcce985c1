"""The ledger: a part once, a verdict once with its deliveries, and refusals of what is no ledger."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from m3ad.errors import ArtifactError
from m3ad.ledger import Ledger, Part

DEFECT = {"area_mm2": 12.5, "peak": 1.0}


def take(ledger: Ledger, name: str = "a", digest: str = "0") -> Part:
    sources = (Path(f"/in/{name}.PNG"), Path(f"/in/{name}.tiff"))
    return ledger.take(camera="left", name=name, sources=sources, hashes=(digest * 64, "1" * 64), size=100)


def judge(ledger: Ledger, part: Part, **more: Any) -> None:
    setup = ledger.setup_id({"bundle": "b", "limits": {"reject": 1.0}})
    told: dict[str, Any] = {"score": 2.0, "verdict": "defect", "defects": [DEFECT], "inspect_ms": 1.0, **more}
    ledger.judged(part.id, setup=setup, **told)


def test_a_part_is_there_once_and_judged_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, create=True) as ledger:
        part = take(ledger)
        assert take(ledger) == part
        assert take(ledger, digest="2").id == part.id + 1
        assert part.rgb.endswith(f"/{part.id:09}.rgb.png")
        assert [p.id for p in ledger.unfinished("left")] == [1, 2]
        assert ledger.unfinished("right") == []
        judge(ledger, part, sinks=["x", "y"], extra_bytes=50)
        judge(ledger, part, score=9.0, sinks=["x", "y"])
        ledger.failed(part.id, "broken", ["x"])
        ledger.failed(2, "broken", ["x"])
    with Ledger(path) as ledger:
        found = ledger.part(1)
        assert found is not None
        assert (found.score, found.verdict, found.largest_mm2, found.bytes) == (2.0, "defect", 12.5, 150)
        assert found.defects == [DEFECT]
        assert ledger.setup(int(found.setup or 0))["limits"] == {"reject": 1.0}
        assert [p.fault for p in ledger.parts("state = ?", "fault")] == ["broken"]
        assert ledger.part(3) is None
        assert ledger.queues() == {"x": (2, 0), "y": (1, 0)}
        assert ledger.query("PRAGMA journal_mode")[0][0] == "wal"


def test_deliveries_keep_their_order_and_dead_ones_come_again(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l", create=True) as ledger:
        for name in "abc":
            judge(ledger, take(ledger, name), sinks=["x"])
        first = ledger.next_delivery("x")
        assert first is not None
        ledger.gave_up(first.id, "404")
        second = ledger.next_delivery("x")
        assert second is not None
        ledger.delivered(second.id)
        assert ledger.queues() == {"x": (1, 1)}
        assert ledger.revive("x") == 1
        order = []
        while waiting := ledger.next_delivery("x"):
            order.append(waiting.part)
            ledger.delivered(waiting.id)
        assert order == [3, 1]
        assert ledger.next_delivery("y") is None


def test_what_people_say_is_kept_whole(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l", create=True) as ledger:
        judge(ledger, take(ledger))
        ledger.say(1, "defect", "ann")
        ledger.say(1, "good", "bob")
        assert [p.said for p in ledger.parts()] == ["good"]
        assert [tuple(r)[2:] for r in ledger.query("SELECT * FROM review")] == [
            ("ann", "defect"),
            ("bob", "good"),
        ]
        ledger.forget_pictures(1)
        (part,) = ledger.parts()
        assert (part.pictures, part.bytes, part.verdict) == (False, 0, "defect")


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; a ledger is written by `m3ad-client station`"):
        Ledger(tmp_path / "absent")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE t (x)")
    for create in (False, True):
        with pytest.raises(ArtifactError, match="is no ledger of this m3ad"):
            Ledger(tmp_path / "other", create=create)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(
        ArtifactError, match=r"text is not a ledger \(file is not a database\); name the ledger\.sqlite"
    ):
        Ledger(tmp_path / "text", create=True)
    with pytest.raises(ArtifactError, match=r"is a folder; name the ledger\.sqlite in it"):
        Ledger(tmp_path)


def test_a_full_disk_is_a_sentence_and_undoes_the_whole_transaction(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l", create=True) as ledger:
        part = take(ledger)
        pages = ledger.query("PRAGMA page_count")[0][0]
        ledger.query(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(
            ArtifactError, match=r"cannot be used \(database or disk is full\); make room there"
        ):
            judge(ledger, part, defects=[{**DEFECT, "note": "x" * 20_000}], sinks=["x"])
        assert [p.state for p in ledger.parts()] == ["taken"]
        assert ledger.queues() == {}
        ledger.query("PRAGMA max_page_count = 100000")
        judge(ledger, part, sinks=["x"])
        assert ledger.queues() == {"x": (1, 0)}
