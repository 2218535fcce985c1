"""A lattice's second pass: every pixel around its highest places is scored, so that the score is the full one.

The smoothing reaches REACH pixels to each side. Where all scores within that are there, map and score maps are those of
scoring every pixel; elsewhere they stay the lattice's.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE
from m3ad.scored import REACH, scored_pixels
from scipy import ndimage

from m3ad_runtime.onnx_graph import Arrays

if TYPE_CHECKING:
    from m3ad_runtime.stages import TiledHead

WIDTH = 2 * REACH + 1
# How far up from the map's median to its peak, or to the limit if that is lower, a place is looked at again. A lattice
# moves a peak by up to 6 % (design, section 8), so the full map's own is among them.
HEIGHT = 0.8


class Refined:
    """The fused head on a lattice, and once more on every pixel around the places that decide.

    Args:
        head: votes on a lattice.
        limit: the lower one of the verdict's; every place near it or above is scored in full, however many there are.
    """

    def __init__(self, head: "TiledHead", limit: float) -> None:
        self.head, self.limit = head, limit

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Score the lattice, vote, score what lies around the highest places, vote again."""
        tokens = self.head.projected_tokens(arrays)
        scores = self.head.scores(arrays, tokens)
        coarse = self.head.vote({**arrays, "scores": scores})
        every = scored_pixels(arrays["point_pixel"])
        more = around(coarse["anomaly_map"], arrays["scored_pixel"], every, self.limit)
        if not len(more):
            return coarse
        added = self.head.scores({**arrays, "scored_pixel": more}, tokens)
        pixels = np.concatenate([arrays["scored_pixel"], more])
        order = np.argsort(pixels)
        ascending = {
            "scores": np.ascontiguousarray(np.concatenate([scores, added], axis=1)[:, order]),
            "scored_pixel": pixels[order],
        }
        return merged(coarse, self.head.vote({**arrays, **ascending}), is_full(pixels, every))


def around(
    anomaly_map: npt.NDArray[np.float32],
    scored_pixel: npt.NDArray[np.int32],
    every: npt.NDArray[np.int32],
    limit: float,
) -> npt.NDArray[np.int32]:
    """The pixels within the smoothing's reach of a high place that are not scored yet.

    A place is high where m >= median + HEIGHT (min(max m, limit) - median), the median over the scored pixels.

    Args:
        anomaly_map: [224, 224] of the lattice.
        scored_pixel: [R] of the lattice, row-major.
        every: [C] all pixels that could be scored.
        limit: of the verdict.

    Returns:
        [A] int32, ascending.
    """
    median = float(np.median(anomaly_map.reshape(-1)[scored_pixel]))
    level = median + HEIGHT * (min(float(anomaly_map.max()), limit) - median)
    near = ndimage.maximum_filter((anomaly_map >= level).astype(np.uint8), WIDTH, mode="constant")
    wanted = every[near.reshape(-1)[every] > 0]
    return np.setdiff1d(wanted, scored_pixel, assume_unique=True)


def is_full(scored_pixel: npt.NDArray[np.int32], every: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Where all that the smoothing looks at is scored: [224, 224]."""
    missing = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    missing.reshape(-1)[every] = 1
    missing.reshape(-1)[scored_pixel] = 0
    full: npt.NDArray[np.bool_] = ndimage.maximum_filter(missing, WIDTH, mode="constant") == 0
    return full


def merged(coarse: Arrays, fine: Arrays, full: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
    """The fine maps where they are full and the coarse ones elsewhere; the score follows from the map.

    A score that is the map's peak stays that; one that is a multiple of it (CFM's, over its mean) keeps the factor.
    """
    maps = {name: np.where(full, fine[name], coarse[name]) for name in ("anomaly_map", "score_maps")}
    peak, before, score = maps["anomaly_map"].max(), coarse["anomaly_map"].max(), coarse["score"]
    factor = 1 if score[0] == before or before <= 0 else score[0] / before
    return {**maps, "score": np.array([peak * factor], np.float32)}
