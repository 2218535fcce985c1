"""A bounded part of `make soak`, with faults closer together."""

from pathlib import Path

import pytest
from m3ad.bundle import Bundle
from soak_parts import Memory, Pace, Result
from soak_served import in_process, served
from soak_station import Soak

pytestmark = pytest.mark.slow


def test_no_part_is_lost_or_judged_twice_while_things_break(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = Soak(tmp_path, tiny_bundle.path, 1).run(Pace(60, 7))
    assert result.wrong == [], result.table()
    told = dict(result.rows)
    assert told["faults"] == "8"
    assert told["  station killed (SIGKILL)"] == "1"
    assert told["ledger: lost / twice"] == "0 / 0"
    assert told["webhook: missing / told again"].startswith("0 / ")


def test_every_answer_is_the_first_or_a_sentence(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for result, faults in (
        (in_process(tiny_bundle.path, Pace(24, 6), 1), 3),
        (served(tmp_path, tiny_bundle.path, Pace(45, 6), 1), 7),
    ):
        assert result.wrong == [], result.table()
        told = dict(result.rows)
        assert told["faults"] == str(faults)
        assert told["right / refused / wrong"].endswith(" / 0")
        assert int(told["right / refused / wrong"].split()[0]) > 20


def test_what_grows_is_told(tmp_path: Path) -> None:
    import os

    result, memory = Result("a test"), Memory()
    for held in (1.0, 1.0, 1.04, 1.2):
        memory.samples.setdefault(("process", os.getpid()), []).extend([int(held * 2**20)] * 10)
    memory.tell(result, ["process"])
    assert result.wrong == ["memory of the process grew by 20.0%"]
    assert "1 MiB, then 1 MiB (+20.0%) in 400 frames" in result.table()
