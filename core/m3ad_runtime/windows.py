"""The part of the grid that a network of windows and convolutions has to compute for some of its pixels.

The network sees each window of consecutive row-major pixels by itself, then runs convolutions over the grid. A pixel
depends on the windows that its convolutions reach into and on nothing else: to leave out the rest is exact.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE, MAX_POINTS
from m3ad.method import CpuForm

from m3ad_runtime.onnx_graph import Arrays, OnnxGraph

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class Region(NamedTuple):
    """What is computed, by the names of a windowed graph's inputs.

    Attributes:
        window_pixel: [K, W] the windows before the convolutions, as row-major pixels of the grid.
        crop_row: [h, w] where each pixel of the convolutions' crop is among those; 0 for one that was left out.
        scored_pixel: [R] the scored pixels in the crop, row-major.
    """

    window_pixel: IntArray
    crop_row: IntArray
    scored_pixel: IntArray


def whole_grid(scored_pixel: IntArray, window: int) -> Region:
    """Every window, no crop: a region whose size does not depend on the frame."""
    every = np.arange(MAX_POINTS, dtype=np.int32)
    return Region(every.reshape(-1, window), every.reshape(IMAGE_SIZE, IMAGE_SIZE), scored_pixel)


def needed(scored_pixel: IntArray, window: int, reach: int) -> Region:
    """What the scored pixels depend on, and no more.

    Args:
        scored_pixel: [R] row-major, at least one.
        window: consecutive pixels that see each other; divides the grid.
        reach: pixels to each side that the convolutions look at.
    """
    scored = np.zeros(MAX_POINTS, np.bool_)
    scored[scored_pixel] = True
    padded = np.pad(scored.reshape(IMAGE_SIZE, IMAGE_SIZE), reach)
    around = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return region(scored_pixel, around.max(axis=(2, 3)), window, reach)


def region(scored_pixel: IntArray, computed: BoolArray, window: int, reach: int) -> Region:
    """The windows that hold a `computed` pixel of the grid [224, 224], and the crop that the scored ones reach."""
    windows = np.flatnonzero(computed.reshape(-1, window).any(axis=1))
    window_pixel = (windows[:, None] * window + np.arange(window)).astype(np.int32)
    row = np.zeros(MAX_POINTS, np.int32)
    row[window_pixel.reshape(-1)] = np.arange(window_pixel.size)
    y, x = np.divmod(scored_pixel, IMAGE_SIZE)
    top, left = max(y.min() - reach, 0), max(x.min() - reach, 0)
    crop_row = row.reshape(IMAGE_SIZE, IMAGE_SIZE)[top : y.max() + reach + 1, left : x.max() + reach + 1]
    place = (y - top) * crop_row.shape[1] + (x - left)
    return Region(window_pixel, np.ascontiguousarray(crop_row), place.astype(np.int32))


class Windowed:
    """A graph of windows and convolutions, run on the windows and the crop that the scored pixels depend on."""

    def __init__(self, graph: OnnxGraph, form: CpuForm) -> None:
        self.graph, self.form = graph, form

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Find the region and run the graph on it."""
        region = needed(arrays["scored_pixel"], self.form.window, self.form.reach)
        return self.graph({**arrays, **region._asdict()})
