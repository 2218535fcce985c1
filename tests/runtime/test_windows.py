"""The region that a windowed stage computes, against what each pixel of a plain network depends on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad_runtime.windows import Region, needed, whole_grid
from token_frames import disc
from torch import nn


def test_only_windows_near_scored_pixels_are_computed() -> None:
    region = needed(np.array([100 * 224 + 60], np.int32), 128, 3)
    assert region.crop_row.shape == (7, 7)
    near = sorted({(row * 224 + column) // 128 for row in range(97, 104) for column in range(57, 64)})
    assert (region.window_pixel[:, 0] // 128).tolist() == near
    assert region.scored_pixel.tolist() == [3 * 7 + 3]
    assert len(whole_grid(np.empty(0, np.int32), 128).window_pixel) == 392


def on_region(values: torch.Tensor, convolutions: nn.Module, region: Region) -> torch.Tensor:
    """Each window's values less their mean, then convolutions on the crop, at the scored pixels."""
    windows = values[torch.from_numpy(region.window_pixel).long()]
    rows = (windows - windows.mean(dim=1, keepdim=True)).reshape(-1)
    crop = convolutions(rows[torch.from_numpy(region.crop_row).long()][None, None])
    return crop.reshape(-1)[torch.from_numpy(region.scored_pixel).long()]


pixels = st.one_of(
    st.builds(disc, st.floats(1, 80), st.floats(0, 223), st.floats(0, 223)),
    st.sets(st.integers(0, 50175), min_size=1, max_size=20).map(
        lambda found: np.array(sorted(found), np.int32)
    ),
)


@settings(max_examples=20, deadline=None)
@given(scored_pixel=pixels, window=st.sampled_from([1, 7, 128, 224, 256]), reach=st.integers(0, 4))
def test_the_region_gives_what_the_whole_grid_gives(
    scored_pixel: np.ndarray, window: int, reach: int
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 1, 3, padding=1).double() for _ in range(reach)]
    convolutions, values = nn.Sequential(*layers), torch.randn(50176).double()
    with torch.no_grad():
        expected = on_region(values, convolutions, whole_grid(scored_pixel, window))
        found = on_region(values, convolutions, needed(scored_pixel, window, reach))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_smaller_reach_is_not_enough() -> None:
    torch.manual_seed(0)
    convolutions = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)))
    values, scored_pixel = torch.randn(50176), disc(20)
    with torch.no_grad():
        expected = on_region(values, convolutions, whole_grid(scored_pixel, 128))
        found = on_region(values, convolutions, needed(scored_pixel, 128, 2))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
