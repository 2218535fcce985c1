"""A bounded part of `heal_under_load.py`: what a line notices by frames that go around the golden one."""

from pathlib import Path

import pytest
from load_and_faults import loaded
from m3ad.bundle import Bundle

pytestmark = pytest.mark.slow


def test_a_line_under_load_heals(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with loaded(tiny_bundle.path, tmp_path) as load:
        found = [load.fault("judge", "hang"), load.fault("prepare", "corrupt")]
        told = (tmp_path / "serve.log").read_text()
    assert [(f.wrong_after, f.refused) for f in found] == [(0, 0)] * 2, load.answers
    assert all(f.noticed_s is not None for f in found)
    assert found[0].wrong == 0
    hung, wrong = [line for line in told.splitlines() if line.endswith("; starting the server again")]
    assert hung.startswith("category tiny: `tiny_judge` is not answered in ")
    assert wrong.startswith("category tiny: `tiny_prepare`: `image` is not what m3ad makes of the same frame")
    assert told.count("served again, ") == 2
