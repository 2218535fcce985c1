"""Which pixels are scored: those whose features the foreground reaches, all of them or those of a lattice."""

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from m3ad.contract import IMAGE_SIZE

# `all`, `half` (quincunx: every other one, as on a chessboard), or k: every k-th row and column.
Lattice = Literal["all", "half"] | int
MAX_STRIDE = 8  # the smoothing behind has a standard deviation of 4.7 pixels
REACH = 19  # pixels to each side that it looks at: five means of 5 and three of 7


def lattice_of(text: str) -> Lattice:
    """A lattice as written on a command line.

    Raises:
        ValueError: it is none.
    """
    lattice: Lattice = int(text) if text.isascii() and text.isdigit() else text  # type: ignore[assignment]
    return checked_lattice(lattice)


def checked_lattice(lattice: Lattice) -> Lattice:
    """The lattice itself.

    Raises:
        ValueError: it is none.
    """
    if lattice in ("all", "half") or (isinstance(lattice, int) and 2 <= lattice <= MAX_STRIDE):
        return lattice
    raise ValueError(f"lattice must be all, half or 2..{MAX_STRIDE}, got {lattice!r}")


def on_lattice(pixels: npt.NDArray[np.int32], lattice: Lattice) -> npt.NDArray[np.int32]:
    """Those of the pixels that lie on a lattice of the 224 x 224 grid.

    half: x + y even.  k: x = y = floor(k / 2) modulo k, so that a cell's pixel lies in its middle.

    Args:
        pixels: [C] int32, row-major, ascending.
        lattice: which.

    Returns:
        [R] int32, ascending.
    """
    if lattice == "all":
        return pixels
    y, x = np.divmod(pixels, IMAGE_SIZE)
    on = (
        (x + y) % 2 == 0
        if lattice == "half"
        else (x % lattice == y % lattice) & (x % lattice == lattice // 2)
    )
    picked: npt.NDArray[np.int32] = pixels[on]
    return picked


def scored_pixels(
    point_pixel: npt.NDArray[np.int32], image_size: int = IMAGE_SIZE, output_size: int | None = None
) -> npt.NDArray[np.int32]:
    """The pixels under whose pooling window lies a foreground pixel: T F T^T > 0, F the foreground, T the taps.

    Args:
        point_pixel: [N] int32, row-major foreground pixels.
        image_size: side of their grid.
        output_size: side of the grid of the pixels that are told, image_size by default.

    Returns:
        [R] int32, ascending.
    """
    foreground = np.zeros((image_size, image_size), np.float32)
    foreground.reshape(-1)[point_pixel] = 1
    taps = taps_of(image_size, image_size if output_size is None else output_size)
    return np.flatnonzero(taps @ foreground @ taps.T > 0).astype(np.int32)


@cache
def taps_of(size: int, side: int) -> npt.NDArray[np.float32]:
    """T [side, size] of one axis: 1 where an output pixel of AdaptiveAvgPool(side) AvgPool(3, stride 1) looks."""
    out, pixel = np.arange(side)[:, None], np.arange(size)[None]
    first, last = out * (size - 2) // side, -(-(out + 1) * (size - 2) // side) + 1
    return ((first <= pixel) & (pixel <= last)).astype(np.float32)
