"""An organised cloud as the relief of a part: depth about its mean, off a background surface through the corners.

References:
    AST  https://github.com/marco-rudolph/AST (MIT): its preprocessing of depth
Depths are [H, W] float32 in metres, 0 where nothing was measured.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.contract import GRID_SIZE
from m3ad.depth_image import bilinear
from m3ad.errors import FrameError

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

FILL_PASSES = 3
CORNER = 2  # pixels of a corner's side
SCALE = 100.0  # what networks see is centimetres
CELL = 8  # pixels of a cell's side, for each of which the mask has a weight


def filled(z: FloatArray) -> FloatArray:
    """Small holes filled: in each of three passes a zero pixel takes the mean of its positive 3x3 neighbours.

    The first row and column stay as they are, as in the authors' code, whose slice is empty there.
    """
    depth = z.astype(np.float64)
    ones = np.ones((3, 3))
    for _ in range(FILL_PASSES):
        positive = depth > 0
        total = ndimage.convolve(np.where(positive, depth, 0), ones, mode="constant")
        count = ndimage.convolve(positive.astype(np.float64), ones, mode="constant")
        hole = (depth == 0) & (count > 0.5)
        hole[0], hole[:, 0] = False, False
        depth[hole] = total[hole] / count[hole]
    return depth.astype(np.float32)


def corner_surface(z: FloatArray) -> FloatArray:
    """The bilinear surface through the mean depths of four 2x2 corners: [H, W] -> [H, W].

    Raises:
        FrameError: nothing was measured in one of them.
    """
    low, high = slice(None, CORNER), slice(-CORNER, None)
    means = []
    for name, corner in (
        ("top left", z[low, low]),
        ("top right", z[low, high]),
        ("bottom left", z[high, low]),
        ("bottom right", z[high, high]),
    ):
        seen = corner[corner > 0]
        if not len(seen):
            raise FrameError(
                f"nothing was measured in its {name} corner, through which the background surface is laid; train with "
                "--plane none, ransac, or fixed and a rig"
            )
        means.append(seen.mean(dtype=np.float64))
    height, width = z.shape
    right, down = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    top = means[0] * (1 - right) + means[1] * right
    bottom = means[2] * (1 - right) + means[3] * right
    return np.asarray(top * (1 - down) + bottom * down, np.float32)


def relief(z: FloatArray, mask: BoolArray) -> tuple[FloatArray, FloatArray]:
    """What the networks see of a part: its depth about its mean, in centimetres, and how much each cell counts.

    Args:
        z: holes filled.
        mask: the part [H, W], at least one pixel of it.

    Returns:
        depth [192, 192], zero off the part, and depth_mask [24, 24] in 0..1: the part grown by an 8x8 square, mean of
        the four middle pixels of each cell.
    """
    size = GRID_SIZE["relief"]
    depth = np.where(mask, SCALE * (z - z[mask].mean(dtype=np.float64)), 0).astype(np.float32)
    part = ndimage.binary_dilation(
        bilinear(mask.astype(np.float32), size) > 0, np.ones((CELL, CELL), np.bool_)
    )
    cells = part.reshape(size // CELL, CELL, size // CELL, CELL)
    middle = slice(CELL // 2 - 1, CELL // 2 + 1)
    weights = cells[:, middle, :, middle].mean(axis=(1, 3), dtype=np.float32)
    return bilinear(depth, size), np.asarray(weights, np.float32)
