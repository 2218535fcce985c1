"""AST's relief of a part against golden figures of the authors' code and a naive reading of its definition."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.preprocess import IMAGENET_MEAN, IMAGENET_STD, prepare
from m3ad.relief import corner_surface, filled, relief
from PIL import Image
from test_depth_image import FRAME

RELIEF = Preprocessing(geometry="relief", plane="corners", plane_distance_m=0.007)


def test_the_relief_has_the_authors_figures() -> None:
    z = filled(FRAME.xyz[..., 2])
    part = (np.abs(z - corner_surface(z)) > 0.007) & (z != 0)
    assert np.count_nonzero(part) == 27583
    assert z[part].mean(dtype=np.float64) == pytest.approx(0.385461, abs=1e-6)
    made = prepare(FRAME, RELIEF)
    assert made.relief is not None
    tolerance = 5e-7 + 1e-5 * float(np.abs(made.relief).max())
    assert made.relief.std() == pytest.approx(0.199924, abs=tolerance)
    assert made.relief[0, 0, 96, 96] == pytest.approx(-0.545907, abs=tolerance)


def test_the_image_is_stretched_to_768() -> None:
    levels = Image.fromarray(FRAME.rgb).resize((768, 768), Image.Resampling.BILINEAR)
    expected = ((np.asarray(levels) / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(prepare(FRAME, RELIEF).image[0], expected, atol=1e-6)


def naive_filled(z: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Pixel by pixel, with the slices of the authors' code: that of the first row and column is empty."""
    depth = z.astype(np.float64)
    for _ in range(3):
        before = depth.copy()
        for r, c in np.argwhere(before == 0):
            around = before[slice(r - 1, r + 2), slice(c - 1, c + 2)]
            if (around > 0).any():
                depth[r, c] = around.sum() / (around > 0).sum()
    return depth


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(3, 14),
    width=st.integers(3, 14),
    holes=st.floats(0, 0.9),
)
def test_filling_is_the_naive_one(seed: int, height: int, width: int, holes: float) -> None:
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((height, width)) < holes, 0, rng.uniform(0.3, 0.5, (height, width))).astype(
        np.float32
    )
    np.testing.assert_allclose(filled(z), naive_filled(z), atol=1e-7)


def test_depth_and_mask_are_what_torch_makes_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    z = rng.uniform(0.3, 0.5, (150, 210)).astype(np.float32)
    mask = np.zeros((150, 210), np.bool_)
    mask[40:101, 70:133] = True
    depth, weights = relief(z, mask)

    def resized(a: npt.NDArray[np.float64], side: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(torch.from_numpy(a)[None, None], (side, side), mode="bilinear")

    centred = np.where(mask, 100 * (z.astype(np.float64) - z[mask].mean(dtype=np.float64)), 0)
    np.testing.assert_allclose(depth, resized(centred, 192)[0, 0].numpy(), atol=2e-5)
    small = (resized(mask.astype(np.float64), 192) > 0).double()
    # A pixel of the part covers 4 pixels before it and 3 behind it.
    grown = torch.nn.functional.max_pool2d(torch.nn.functional.pad(small, (3, 4, 3, 4)), 8, stride=1)
    expected = torch.nn.functional.interpolate(grown, (24, 24), mode="bilinear")[0, 0]
    np.testing.assert_allclose(weights, expected.numpy(), atol=1e-6)
    assert {0.0, 0.5, 1.0} <= set(weights.ravel().tolist())


def test_frames_without_a_background_or_a_part_are_refused() -> None:
    holed = FRAME.xyz.copy()
    holed[:8, -8:] = 0
    with pytest.raises(
        FrameError, match=r"frame dome: nothing was measured in its top right corner.*--plane none"
    ):
        prepare(Frame(FRAME.rgb, holed, "dome"), RELIEF)
    with pytest.raises(FrameError, match=r"plane removal `corners` left none .* more than 50 mm"):
        prepare(FRAME, replace(RELIEF, plane_distance_m=0.05))
    whole = prepare(Frame(FRAME.rgb, holed, "dome"), replace(RELIEF, plane="none"))
    assert len(whole.points) > len(prepare(FRAME, RELIEF).points)
    found = prepare(FRAME, replace(RELIEF, plane="ransac"))
    assert found.relief is not None
    assert np.count_nonzero(found.relief) > 5000
