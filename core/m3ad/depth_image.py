"""An organised cloud as an image: CRD's depth image or TRD's surface normals, of what lies off the background plane.

References:
    CRD  https://github.com/hito2448/CRD (depth image; no licence, written anew); TRD by the same authors (normals)
Clouds are [H, W, 3] float32 in metres, (0, 0, 0) where nothing was measured.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.errors import FrameError
from m3ad.plane import Plane

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Value = TypeVar("Value", np.float32, np.bool_)

FILL_PASSES = 2
NORMAL_SIZES = (3, 5, 7)
# Sobel's smoothing and derivative of each size, as OpenCV takes them; they set the slopes' gain: 8, 128, 2048.
SOBEL: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    3: ((1, 2, 1), (-1, 0, 1)),
    5: ((1, 4, 6, 4, 1), (-1, -2, 0, 2, 1)),
    7: ((1, 6, 15, 20, 15, 6, 1), (-1, -4, -5, 0, 5, 4, 1)),
}


def nearest(image: npt.NDArray[Value], size: int) -> npt.NDArray[Value]:
    """Stretched to a square by nearest sampling, row floor(i H / size), column likewise: [H, W, ...] -> [S, S, ...]."""
    rows, columns = (np.arange(size) * n // size for n in image.shape[:2])
    return image[np.ix_(rows, columns)]


def corner_plane(xyz: FloatArray) -> Plane:
    """The plane through the mean points of three 3x3 corners, top left, top right and bottom left.

    Returns:
        (a, b, c, d) of ax + by + cz + d = 0, metres, with a unit normal.

    Raises:
        FrameError: nothing was measured in one of them, or they lie on one line.
    """
    means = []
    for name, corner in (
        ("top left", xyz[:3, :3]),
        ("top right", xyz[:3, -3:]),
        ("bottom left", xyz[-3:, :3]),
    ):
        points = corner.reshape(-1, 3).astype(np.float64)
        count = np.count_nonzero(points[:, 2])
        if not count:
            raise FrameError(
                f"nothing was measured in its {name} corner, through which the background plane is laid; train with "
                "--plane none, ransac, or fixed and a rig"
            )
        means.append(points.sum(axis=0) / count)
    normal = np.cross(means[1] - means[0], means[2] - means[0])
    length = float(np.linalg.norm(normal))
    if not length > 0:
        raise FrameError(
            "its corners lie on one line, through which there is no plane; train with --plane none or ransac"
        )
    a, b, c = (float(v) for v in normal / length)
    return a, b, c, -float(normal @ means[0]) / length


def closed(mask: BoolArray) -> BoolArray:
    """Gaps of up to six pixels bridged: a 7x7 dilation, then an erosion that does not eat at the border."""
    seven = np.ones((7, 7), np.bool_)
    grown = ndimage.binary_dilation(mask, seven)
    return ndimage.binary_erosion(grown, seven, border_value=1)


def depth_image(z: FloatArray, mask: BoolArray, low: float = 0.1, high: float = 0.9) -> FloatArray:
    """Depth inside the mask, scaled to low..high over the frame, zero elsewhere, small holes filled: [H, W] -> [H, W].

    Each of two passes gives a zero pixel the mean of its positive 3x3 neighbours, so that the outline grows by two.
    """
    depth = np.where(mask, z, 0).astype(np.float32)
    inside = depth != 0
    if inside.any():
        least, span = depth[inside].min(), np.ptp(depth[inside])
        part = (depth[inside] - least) / (span if span > 0 else np.float32(1))
        depth[inside] = np.float32(low) + np.float32(high - low) * part
    ones = np.ones(3, np.float32)
    for _ in range(FILL_PASSES):
        positive = depth > 0
        total, count = (
            ndimage.convolve1d(
                ndimage.convolve1d(a.astype(np.float64), ones, axis=0, mode="constant"),
                ones,
                axis=1,
                mode="constant",
            )
            for a in (np.where(positive, depth, 0), positive)
        )
        hole = (depth == 0) & (count > 0.5)
        depth[hole] = (total[hole] / count[hole]).astype(np.float32)
    return depth


def normal_image(z: FloatArray, mask: BoolArray, size: int) -> FloatArray:
    """Normals (-dx, -dy, 1) of the depth scaled to 0..1, brought to length 1 and to 0..1, zero off the mask.

    dx and dy are Sobel's of `size` pixels, the border mirrored without its edge: [H, W] -> [H, W, 3].
    """
    depth = depth_image(z, mask, 0.0, 1.0).astype(np.float64)
    smooth, derivative = (np.array(taps, np.float64) for taps in SOBEL[size])
    slopes = [
        ndimage.correlate1d(
            ndimage.correlate1d(depth, smooth, axis=axis, mode="mirror"),
            derivative,
            axis=1 - axis,
            mode="mirror",
        )
        for axis in (0, 1)
    ]
    normal = np.stack([-slopes[0], -slopes[1], np.ones_like(depth)], axis=2)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True) + 1e-8
    return ((normal + 1) / 2 * mask[..., None]).astype(np.float32)


def bilinear(image: FloatArray, size: int) -> FloatArray:
    """Stretched to a square by linear interpolation of two neighbours, pixel centres at .5, no antialiasing."""
    out = image
    for axis in (0, 1):
        length = image.shape[axis]
        source = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0)
        low = np.minimum(source.astype(np.intp), length - 1)
        part = (source - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
        high = np.minimum(low + 1, length - 1)
        out = np.take(out, low, axis) * (1 - part) + np.take(out, high, axis) * part
    return np.asarray(out, np.float32)
