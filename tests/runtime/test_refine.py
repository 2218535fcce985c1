"""A lattice's second pass against plain NumPy: which pixels it scores, where its map is the full one, its score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.scored import on_lattice, scored_pixels
from m3ad_runtime.refine import HEIGHT, around, is_full, merged

SIZE = 224
DISC = np.hypot(*(np.mgrid[:SIZE, :SIZE] - 112)) < 90
EVERY = scored_pixels(np.flatnonzero(DISC).astype(np.int32))


def within_19(pixels: np.ndarray) -> np.ndarray:
    """Every pixel at most 19 rows and columns from one of these, one by one: [224, 224]."""
    near = np.zeros((SIZE, SIZE), np.bool_)
    for y, x in zip(*np.divmod(pixels, SIZE), strict=True):
        near[max(y - 19, 0) : y + 20, max(x - 19, 0) : x + 20] = True
    return near


def map_with(peaks: dict[tuple[int, int], float]) -> np.ndarray:
    anomaly_map = np.zeros((SIZE, SIZE), np.float32)
    anomaly_map.reshape(-1)[EVERY] = 1
    for place, value in peaks.items():
        anomaly_map[place] = value
    return anomaly_map


@settings(max_examples=20, deadline=None)
@given(
    lattice=st.sampled_from(["half", 2, 3, 5]),
    places=st.lists(st.tuples(*[st.integers(30, 190)] * 2), min_size=1, max_size=4, unique=True),
    limit=st.sampled_from([2.0, 3.0, 50.0]),
)
def test_every_pixel_near_a_high_place_is_scored_and_no_other(
    lattice: str | int, places: list[tuple[int, int]], limit: float
) -> None:
    values = [2.0 + 0.9 * i for i in range(len(places))]
    anomaly_map = map_with(dict(zip(places, values, strict=True)))
    scored = on_lattice(EVERY, lattice)  # type: ignore[arg-type]
    level = 1 + HEIGHT * (min(max(values), limit) - 1)  # the median of the part is 1
    high = [y * SIZE + x for (y, x), value in zip(places, values, strict=True) if value >= level]
    more = around(anomaly_map, scored, EVERY, limit)
    wanted = set(EVERY.tolist()) & set(np.flatnonzero(within_19(np.array(high))).tolist()) - set(
        scored.tolist()
    )
    assert set(more.tolist()) == wanted
    assert more.dtype == np.int32
    full = is_full(np.concatenate([scored, more]), EVERY)
    assert full.reshape(-1)[high].all()
    missing = np.setdiff1d(EVERY, np.concatenate([scored, more]))
    np.testing.assert_array_equal(full, ~within_19(missing))


@pytest.mark.parametrize(("factor", "score"), [(1.0, 5.5), (0.5, 2.75)])
def test_the_score_follows_the_peak(factor: float, score: float) -> None:
    """A map's peak stays the score; a score that is a multiple of it (CFM's, over the mean) keeps the factor."""
    coarse, fine = map_with({(100, 100): 6.0}), map_with({(100, 100): 5.5, (30, 112): 9.0})
    full = np.zeros((SIZE, SIZE), np.bool_)
    full[90:110, 90:110] = True

    def outputs(anomaly_map: np.ndarray) -> dict[str, np.ndarray]:
        peak = np.array([anomaly_map.max() * factor], np.float32)
        return {"anomaly_map": anomaly_map, "score_maps": anomaly_map[None], "score": peak}

    found = merged(outputs(coarse), outputs(fine), full)
    assert found["score"].tolist() == [score]
    assert found["score"].dtype == np.float32
    np.testing.assert_array_equal(found["anomaly_map"], np.where(full, fine, coarse))
    np.testing.assert_array_equal(found["score_maps"][0], found["anomaly_map"])


def test_a_peak_below_zero_is_the_score_too() -> None:
    below = {"anomaly_map": map_with({}) - 3, "score": np.array([-2], np.float32)}
    below["score_maps"] = below["anomaly_map"][None]
    assert merged(below, below, np.ones((SIZE, SIZE), np.bool_))["score"].tolist() == [-2]
