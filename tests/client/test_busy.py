"""Busy processes are there while frames are measured, use a core each, and are gone afterwards."""

import os
import time
from pathlib import Path

import pytest
from m3ad.frames import Sample
from m3ad_client import report
from m3ad_client.busy import busy_processes
from m3ad_client.candidates import Measured
from m3ad_client.measure import run_bench
from test_candidates import SAMPLE, Form


def ticks(pid: int) -> int:
    """Processor time of a process, in the kernel's ticks; fails when it is gone."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def children() -> set[int]:
    """Of this process, not yet waited for."""
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


def test_each_uses_its_core_until_the_block_ends_however_it_ends() -> None:
    kept: list[int] = []

    def fail() -> None:
        with busy_processes(2) as pids:
            kept.extend(pids)
            deadline = time.monotonic() + 30
            while min(ticks(pid) for pid in pids) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            raise RuntimeError("a frame was refused")

    with pytest.raises(RuntimeError, match="a frame was refused"):
        fail()
    assert len(set(kept)) == 2
    assert not set(kept) & children()


def test_a_benchmark_beside_them_says_so() -> None:
    before, seen = children(), []

    class Looks(Form):
        def measure(self, sample: Sample, region: str) -> Measured:
            seen.append(len(children() - before))
            return super().measure(sample, region)

    found = run_bench([Looks("a")], [SAMPLE], frames=2, warmup=1, beside=1)
    assert seen[:3] == [0, 1, 1]  # the warm-up, then the measured frames
    assert children() == before
    (first, _) = found["rows"]
    assert first["beside"] == 1
    assert ", beside 1 busy process, " in report.conditions(first)
    assert "beside" not in report.conditions({**first, "beside": 0})
