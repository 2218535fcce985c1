"""Forms under measurement: each has a row, a ratio and a map of its own, whatever they are called."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m3ad.frames import Sample
from m3ad_client import report
from m3ad_client.bench import StageTime
from m3ad_client.candidates import Measured, distinct_names
from m3ad_client.measure import run_bench
from m3ad_runtime.worker import END_TO_END, INFERENCE_ONLY


@dataclass
class Form:
    """A form that takes the times it is told, and whose map is all one value."""

    name: str
    traits: tuple[str, ...] = ()
    ms: Sequence[float] = (1.0,)
    level: float = 0.0
    regions: tuple[str, ...] = (INFERENCE_ONLY, END_TO_END)
    pid: int | None = None
    cold_start_ms: float | None = None
    device_bytes: int | None = None
    conditions: dict[str, Any] = field(
        default_factory=lambda: {
            **dict.fromkeys(("how", "hardware", "runtime", "device", "precision", "layout", "weights"), "x"),
            "threads": 1,
            "lattice": "half",
            "parameter_bytes": 1,
        }
    )
    asked: int = -1  # the warm-up frame

    def measure(self, sample: Sample, region: str) -> Measured:
        self.asked += 1
        return Measured(self.ms[(self.asked - 1) % len(self.ms)], 1024, {"rgb_extractor": 0.5})

    def anomaly_map(self, sample: Sample, folder: Path) -> np.ndarray:
        return np.full((224, 224), self.level, np.float32)

    def start_stages(self) -> None:
        pass

    def stages(self, frames: int) -> list[StageTime]:
        return [StageTime("rgb_extractor", 1, self.ms[0])]

    def close(self) -> None:
        pass


SAMPLE = Sample(Path("rgb"), Path("xyz"), None, "", "", "0")


def test_two_forms_of_one_name_have_rows_ratios_and_maps_of_their_own() -> None:
    here = Form("fused", ("in process", "bundle"), [2.0, 4.0, 8.0])
    torch = Form("fused", ("PyTorch", "detector"), [6.0, 8.0, 8.0], level=0.25, regions=(INFERENCE_ONLY,))
    found = run_bench([here, torch], [SAMPLE], frames=3, warmup=1)
    rows = {(row["name"], row["region"].partition(":")[0]): row for row in found["rows"]}
    assert rows.keys() == {
        ("fused (in process)", INFERENCE_ONLY),
        ("fused (PyTorch)", INFERENCE_ONLY),
        ("fused (in process)", END_TO_END),
    }
    assert rows["fused (in process)", INFERENCE_ONLY]["p50_ms"] == 4.0
    assert rows["fused (PyTorch)", INFERENCE_ONLY]["p50_ms"] == 8.0
    assert all(row["frames"] == 3 for row in found["rows"])
    assert found["ratios"]["fused (PyTorch)/fused (in process)"] == 2.0  # of 3, 2 and 1
    assert found["ratio_spread"]["fused (PyTorch)/fused (in process)"]["high"] == 3.0
    assert rows["fused (PyTorch)", INFERENCE_ONLY]["map_max_error"] == 0.25
    assert rows["fused (in process)", INFERENCE_ONLY]["map_max_error"] == 0.0
    assert "map within 2.5e-01 of the reference's, whose largest value is 0;" in report.conditions(
        rows["fused (PyTorch)", INFERENCE_ONLY]
    )
    assert found["memory"].keys() == {"fused (in process)", "fused (PyTorch)"}
    assert [(s["run"], s["infer_ms"]) for s in found["stages"]] == [
        ("fused (in process)", 2.0),
        ("fused (PyTorch)", 6.0),
    ]
    speed, *_ = report.bench_tables([found])
    assert [row[6] for row in speed.rows if row[0] == "fused (PyTorch)"] == ["2.00 (1.00 .. 3.00)"]
    assert "a frame of fused (in process) takes 8.00 times its own RGB encoder" in speed.notes


@pytest.mark.parametrize(
    ("forms", "names"),
    [
        ([("fused", ("in process",)), ("dense", ("PyTorch",))], ["fused", "dense"]),
        (
            [("chain", ("a:1", "tiny")), ("chain", ("b:1", "tiny"))],
            ["chain (a:1)", "chain (b:1)"],
        ),
        ([("chain", ("a:1", "x")), ("chain", ("a:1", "y"))], ["chain (x)", "chain (y)"]),
        (
            [("fused", ("in process", "b8")), ("fused", ("in process", "b32")), ("fused", ("PyTorch", "d"))],
            ["fused (in process, b8)", "fused (in process, b32)", "fused (PyTorch)"],
        ),
        (
            [("fused", ("in process", "b", "/x/b")), ("fused", ("in process", "b", "/y/b"))],
            ["fused (/x/b)", "fused (/y/b)"],
        ),
        ([("fused", ("b",)), ("fused", ("b",))], ["fused #1", "fused #2"]),
        ([], []),
    ],
)
def test_namesakes_are_told_apart_by_what_differs(
    forms: list[tuple[str, tuple[str, ...]]], names: list[str]
) -> None:
    assert distinct_names([Form(name, traits) for name, traits in forms]) == names


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.sampled_from("xyz"), max_size=3)), max_size=8))
def test_no_two_names_are_ever_alike(forms: list[tuple[str, list[str]]]) -> None:
    names = distinct_names([Form(name, tuple(traits)) for name, traits in forms])
    assert len(set(names)) == len(names) == len(forms)
    assert all(told.startswith(name) for told, (name, _) in zip(names, forms, strict=True))
