"""Which pixels are scored: those whose features the foreground reaches."""

from functools import cache

import numpy as np
import numpy.typing as npt

from m3ad.contract import IMAGE_SIZE


def scored_pixels(point_pixel: npt.NDArray[np.int32], image_size: int = IMAGE_SIZE) -> npt.NDArray[np.int32]:
    """The pixels under whose pooling window lies a foreground pixel: T F T^T > 0, F the foreground, T the taps.

    Args:
        point_pixel: [N] int32, row-major foreground pixels.
        image_size: side of the pixel grid.

    Returns:
        [R] int32, ascending.
    """
    foreground = np.zeros((image_size, image_size), np.float32)
    foreground.reshape(-1)[point_pixel] = 1
    taps = _taps(image_size)
    return np.flatnonzero(taps @ foreground @ taps.T > 0).astype(np.int32)


@cache
def _taps(size: int) -> npt.NDArray[np.float32]:
    """T [size, size] of one axis: 1 where an output pixel of AdaptiveAvgPool(size) AvgPool(3, stride 1) looks."""
    out, pixel = np.arange(size)[:, None], np.arange(size)[None]
    first, last = out * (size - 2) // size, -(-(out + 1) * (size - 2) // size) + 1
    return ((first <= pixel) & (pixel <= last)).astype(np.float32)
