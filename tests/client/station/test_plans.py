"""How SQLite answers what the page asks: by an index, newest first; a ledger of years is as fast as a new one."""

from pathlib import Path

import pytest
from m3ad.ledger import Ledger
from m3ad_client.station.parts_query import WORDS, Filters


def plan(ledger: Ledger, where: str, values: list[object], order: str = "id DESC LIMIT 51") -> str:
    rows = ledger.query(f"EXPLAIN QUERY PLAN SELECT * FROM part WHERE {where} ORDER BY {order}", *values)
    return "; ".join(row["detail"] for row in rows)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    opened = Ledger(tmp_path / "ledger.sqlite", create=True)
    yield opened
    opened.close()


@pytest.mark.parametrize("verdict", ["", *WORDS])
@pytest.mark.parametrize("before", [None, 5000])
def test_every_filter_is_answered_by_an_index_without_sorting(
    ledger: Ledger, verdict: str, before: int | None
) -> None:
    where, values = Filters(verdict=verdict).where()
    if before is not None:
        where, values = f"{where} AND id < ?", [*values, before]
    told = plan(ledger, where, values)
    assert "TEMP B-TREE" not in told
    wanted = {
        "": "PRIMARY KEY" if before else "SCAN part",  # from the newest on, and it ends after a page
        "fault": "part_fault",
        "open": "part_open",
    }
    assert wanted.get(verdict, "part_verdict") in told, told


def test_the_wall_and_the_next_open_part_read_no_more_than_they_show(ledger: Ledger) -> None:
    told = plan(ledger, "camera = ? AND state != 'taken'", ["left"], "id DESC LIMIT 12")
    assert "part_camera" in told
    assert "TEMP B-TREE" not in told
    where, values = Filters(verdict="open").where()
    for beside, order in (("id > ?", "id LIMIT 1"), ("id < ?", "id DESC LIMIT 1")):
        told = plan(ledger, f"{where} AND {beside}", [*values, 7], order)
        assert "part_open" in told
        assert "TEMP B-TREE" not in told
    told = "; ".join(
        row["detail"]
        for row in ledger.query(
            "EXPLAIN QUERY PLAN SELECT * FROM delivery WHERE sink = 'a' AND dead IS NULL ORDER BY id"
        )
    )
    assert "delivery_sink" in told
    assert "TEMP B-TREE" not in told


def test_a_ledger_of_before_gets_the_indices(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, create=True) as made:
        for name in ("part_camera", "part_verdict", "part_open", "part_fault"):
            made.query(f"DROP INDEX {name}")
    with Ledger(path) as read:  # by a program that only looks on
        assert "part_open" not in plan(read, *Filters(verdict="open").where())
    with Ledger(path, create=True) as opened:
        assert "part_open" in plan(opened, *Filters(verdict="open").where())
