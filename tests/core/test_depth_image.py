"""Images of a cloud against golden figures of the authors' OpenCV code and a naive reading of their definition."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.depth_image import bilinear, closed, corner_plane, depth_image, nearest, normal_image
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.grid import prepare_mask, to_frame
from m3ad.plane import distance_m
from m3ad.preprocess import IMAGENET_MEAN, IMAGENET_STD, prepare
from PIL import Image

DEPTH = Preprocessing(geometry="depth", plane="corners")
NORMALS = Preprocessing(geometry="normals", plane="corners")


def dome() -> npt.NDArray[np.float32]:
    """A half ball on a tilted plate, 1855 points of it missing."""
    r, c = np.mgrid[:300, :300].astype(np.float64)
    x, y, rho = (c - 150) * 5e-4, (r - 150) * 5e-4, np.hypot(r - 150, c - 150)
    ball = np.where(rho < 100, 0.02 * np.sqrt(np.maximum(1 - (rho / 100) ** 2, 0)), 0)
    xyz = np.stack([x, y, 0.4 + 0.02 * x - 0.01 * y - ball], axis=-1)
    xyz[((7 * r + 13 * c) % 97 < 2) & (rho > 3)] = 0
    return xyz.astype(np.float32)


FRAME = Frame(np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8), dome(), "dome")


def undone(image: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """[1, 3, 256, 256] before its normalisation: [256, 256, 3]."""
    assert image is not None
    return image[0].transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN


def test_the_depth_image_has_the_authors_figures() -> None:
    made = prepare(FRAME, DEPTH)
    assert made.image.shape == (1, 3, 256, 256)
    depth = undone(made.depth_image)
    np.testing.assert_allclose(depth[..., 0], depth[..., 2], atol=1e-6)
    grey = depth[..., 0]
    assert grey.mean() == pytest.approx(0.147118, abs=2e-6)
    assert grey.std() == pytest.approx(0.240301, abs=2e-6)
    assert grey[128, 128] == pytest.approx(0.101540, abs=2e-6)
    assert grey[60, 128] == pytest.approx(0.519294, abs=2e-6)
    assert np.count_nonzero(grey > 1e-6) == 22734
    xyz = nearest(FRAME.xyz, 256)
    mask = closed((distance_m(xyz, corner_plane(xyz)) > 0.005) & (xyz[..., 2] != 0))
    assert np.count_nonzero(mask) == 21406
    assert len(made.points) == np.count_nonzero(mask & (xyz[..., 2] != 0))
    np.testing.assert_array_equal(made.scored_pixel, np.arange(256 * 256))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3, (0.562554, 0.501248, 0.996069)),
        (5, (0.947946, 0.508614, 0.721934)),
        (7, (0.999668, 0.509460, 0.515467)),
    ],
)
def test_the_normals_have_the_authors_figures(size: int, expected: tuple[float, ...]) -> None:
    made = undone(prepare(FRAME, replace(NORMALS, normal_size=size)).depth_image)
    np.testing.assert_allclose(made[128, 60], expected, atol=2e-6)


def naive_depth(z: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Pixel by pixel, as the definition reads."""
    depth = np.where(mask, z, 0)
    inside = depth != 0
    if inside.any():
        low, high = depth[inside].min(), depth[inside].max()
        depth[inside] = 0.1 + 0.8 * (depth[inside] - low) / (high - low if high > low else 1)
    for _ in range(2):
        before = depth.copy()
        for r, c in np.argwhere(before == 0):
            near = before[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
            if (near > 0).any():
                depth[r, c] = near[near > 0].mean()
    return depth


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 14), st.integers(3, 14), st.floats(0, 1))
def test_holes_are_filled_pixel_by_pixel(seed: int, height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.3, 0.5, (height, width)).astype(np.float32)
    z[rng.random((height, width)) < 0.2] = 0
    mask = rng.random((height, width)) < share
    np.testing.assert_allclose(depth_image(z, mask), naive_depth(z.astype(np.float64), mask), atol=1e-5)


def test_a_plane_has_the_normals_of_its_slope() -> None:
    """z scaled to 0..1 falls by 1/(W-1) a column; Sobel 3 sees eight times that, the border its mirror."""
    z = np.tile(np.linspace(0.5, 0.4, 41, dtype=np.float32), (20, 1))
    made = normal_image(z, np.ones(z.shape, np.bool_), 3)
    slope = -8 / 40
    normal = np.array([-slope, 0, 1]) / np.hypot(slope, 1)
    np.testing.assert_allclose(made[5:-5, 5:35], np.broadcast_to((normal + 1) / 2, (10, 30, 3)), atol=1e-5)
    np.testing.assert_allclose(made[:, 0, 0], 0.5, atol=1e-6)


def test_stretching_takes_two_neighbours() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((30, 47, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (64, 64), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(bilinear(image, 64), expected.numpy(), atol=1e-6)


def test_frames_are_stretched_there_and_back() -> None:
    xyz = np.zeros((120, 200, 3), np.float32)
    xyz[..., 2] = 0.5
    mask = np.zeros((120, 200), np.bool_)
    mask[30:60, 50:100] = True
    rgb = np.zeros((120, 200, 3), np.uint8)
    rgb[mask] = 255
    made = prepare(Frame(rgb, xyz, "wide"), Preprocessing(geometry="depth"))
    expected = np.array(Image.fromarray(rgb).resize((256, 256), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(undone(made.image), expected, atol=1e-5)
    grid = prepare_mask(mask, "depth")
    assert grid.shape == (256, 256)
    np.testing.assert_array_equal(grid, undone(made.image)[..., 0] > 0.5)
    back = to_frame(grid.astype(np.float32), 120, 200, "depth") > 0.5
    assert np.count_nonzero(back != mask) <= 2 * (30 + 50)


def corner_lost(row: int, column: int) -> npt.NDArray[np.float32]:
    """A 6x6 corner not measured, which holds the 3x3 of the frame and of the grid of 256."""
    xyz = dome()
    rows, columns = (slice(6) if first else slice(-6, None) for first in (row == 0, column == 0))
    xyz[rows, columns] = np.nan if column else 0
    return xyz


def on_a_line() -> npt.NDArray[np.float32]:
    """Every point at the same place, holes as before."""
    xyz = dome()
    xyz[xyz[..., 2] != 0] = (0.1, 0.1, 0.4)
    return xyz


def flat() -> npt.NDArray[np.float32]:
    xyz = dome()
    xyz[xyz[..., 2] != 0, 2] = 0.4
    return xyz


@pytest.mark.parametrize("preprocessing", [DEPTH, NORMALS])
@pytest.mark.parametrize(
    ("xyz", "message"),
    [
        (corner_lost(0, 0), "frame dome: nothing was measured in its top left corner"),
        (corner_lost(0, 1), "frame dome: nothing was measured in its top right corner"),
        (corner_lost(1, 0), "nothing was measured in its bottom left corner, through which .* --plane none"),
        (on_a_line(), "frame dome: its corners lie on one line"),
        (flat(), "plane removal `corners` left none of"),
        (np.zeros_like(dome()), "frame dome is all background"),
        (dome() * 1000, "xyz must be in metres"),
    ],
)
def test_what_cannot_be_seen_is_one_sentence(
    preprocessing: Preprocessing, xyz: npt.NDArray[np.float32], message: str
) -> None:
    with pytest.raises(FrameError, match=message):
        prepare(Frame(FRAME.rgb, xyz, "dome"), preprocessing)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="plane corners is for methods that see the cloud as an image"):
        Preprocessing(plane="corners")
    with pytest.raises(ValueError, match="normal_size must be 3, 5 or 7, got 4"):
        Preprocessing(normal_size=4)
    with pytest.raises(
        ValueError, match="geometry must be one of points, fpfh, depth, normals, relief, got 'mesh'"
    ):
        Preprocessing(geometry="mesh")  # type: ignore[arg-type]
    assert Preprocessing.from_json(NORMALS.to_json()) == NORMALS
    before = {k: v for k, v in Preprocessing().to_json().items() if k not in ("geometry", "normal_size")}
    assert Preprocessing.from_json(before) == Preprocessing()


def test_without_plane_removal_everything_is_shown() -> None:
    made = prepare(FRAME, Preprocessing(geometry="depth"))
    assert len(made.points) == np.count_nonzero(nearest(FRAME.xyz, 256)[..., 2])
    ransac = prepare(FRAME, Preprocessing(geometry="depth", plane="ransac"))
    corners = prepare(FRAME, DEPTH)
    assert abs(len(ransac.points) - len(corners.points)) < 0.03 * len(corners.points)
