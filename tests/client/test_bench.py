from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m3ad_client.bench import (
    Counters,
    latency,
    mean_stage_times,
    percentile,
    ratio,
    stage_times,
)


def test_a_ratio_is_taken_frame_by_frame() -> None:
    value, spread = ratio(
        [2.0, 60.0, 8.0, 10.0], [1.0, 20.0, 2.0, 2.0]
    )  # a slow moment of both is no difference
    assert value == 3.5
    assert spread == {"low": 2.0, "q1": 2.0, "q3": 4.0, "high": 5.0}
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_latency_of_known_frames() -> None:
    found = latency([float(ms) for ms in range(100, 0, -1)])
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (50, 90, 99)
    assert found.frames == 100
    assert found.mean_ms == pytest.approx(50.5)
    assert found.frames_per_second == pytest.approx(100 / 5.05)


@given(
    st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60),
    st.integers(1, 100),
)
def test_percentile_is_numpy_s_inverted_cdf(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_percentile_refuses_what_has_none(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="expected values and a percentile"):
        percentile(values, percent)


def test_stage_times_are_what_came_on_top_per_frame() -> None:
    before = {"mfm": Counters(7, 100, 200, 1_000_000, 300), "vm": Counters(3, 0, 0, 0, 0)}
    after = {
        "mfm": Counters(11, 100 + 4_000_000, 200 + 1_000_000, 1_000_000 + 8_000_000, 300 + 500_000),
        "vm": Counters(5, 0, 0, 3_000_000, 0),
    }
    mfm, vm = stage_times(before, after, frames=2)
    assert (mfm.stage, mfm.uses, mfm.infer_ms, mfm.queue_ms) == ("mfm", 2, 4.0, 2.0)
    assert mfm.transfer_ms == pytest.approx(0.75)
    assert (vm.stage, vm.uses, vm.infer_ms) == ("vm", 1, 1.5)


def test_in_process_stage_times_count_mfm_twice() -> None:
    def readings() -> Iterator[dict[str, float]]:
        yield {"mfm": 1.0, "mgm": 5.0, "mfm again": 3.0}
        yield {"mfm": 2.0, "mgm": 7.0, "mfm again": 2.0}

    mfm, mgm = mean_stage_times(list(readings()))
    assert (mfm.stage, mfm.uses, mfm.infer_ms) == ("mfm", 2, 4.0)
    assert (mgm.uses, mgm.infer_ms) == (1, 6.0)
