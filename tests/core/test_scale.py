"""A part in another unit than in training is told by its size, wherever its origin lies."""

import numpy as np
import pytest
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.preprocess import prepare
from m3ad.scale import extent


def part(scale: float = 1.0, kept: float = 1.0) -> Frame:
    """A part of 80 x 80 mm around its own middle, as height sensors give it; `kept` is the share of it in view."""
    v, u = (np.indices((100, 100)) - 49.5) / 100 * 0.08
    xyz = np.stack([u, v, 0.004 * np.cos(60 * u)], axis=-1)
    xyz[np.abs(u) > 0.04 * kept] = 0
    return Frame(np.zeros((100, 100, 3), np.uint8), (xyz * scale).astype(np.float32), "part")


EXTENT_M = extent(prepare(part(), Preprocessing()).points)


def test_extent_is_a_size():
    assert 0.9 * 0.08 * np.sqrt(2) == pytest.approx(EXTENT_M, rel=0.02)
    points = prepare(part(), Preprocessing()).points
    np.testing.assert_allclose(extent(points + np.float32(0.5)), EXTENT_M, rtol=1e-4)
    points[:100] = 90  # single stray points do not count
    assert extent(points) == pytest.approx(EXTENT_M, rel=0.02)


@pytest.mark.parametrize("factor", [10, 25.4, 39.37, 100, 1000])
@pytest.mark.parametrize("is_larger", [True, False])
def test_another_unit_is_named_by_its_factor(factor: float, is_larger: bool):
    settings = Preprocessing(extent_m=EXTENT_M)
    verb = "divide" if is_larger else "multiply"
    with pytest.raises(
        FrameError,
        match=rf"frame part: its part is .* times as large .*in another unit, {verb} it by {factor:g}$",
    ):
        prepare(part(factor if is_larger else 1 / factor), settings)


@pytest.mark.parametrize(("scale", "kept"), [(1, 1), (1, 0.3), (0.5, 1), (3, 1)])
def test_other_sizes_of_the_same_unit_pass(scale: float, kept: float):
    assert len(prepare(part(scale, kept), Preprocessing(extent_m=EXTENT_M)).points) >= 1024


def test_without_a_record_nothing_is_compared():
    assert len(prepare(part(1000), Preprocessing()).points) == 224 * 224
