"""Whether picture and cloud lie on each other: the agreement of their edges, over shifts and mirrorings."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.contract import IMAGE_SIZE
from m3ad.preprocess import ModelInput

Floats = npt.NDArray[np.float64]
REACH = 16  # pixels of the grid that a shift is looked for within
TOLERATED = 2
# An agreement that is no accident, and how much better another placement must be to be called the right one.
LEAST, BETTER = 0.06, 1.25
MIRRORED = {
    "mirrored left to right": (slice(None), slice(None, None, -1)),
    "upside down": (slice(None, None, -1), slice(None)),
    "turned by half": (slice(None, None, -1), slice(None, None, -1)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """Strength of the edges of a frame's picture and of its cloud, [224, 224] each, 0..1."""

    rgb: Floats
    xyz: Floats

    @classmethod
    def of(cls, prepared: ModelInput) -> "Edges":
        """The edges of a prepared frame: of grey, of depth between measured points, and the cloud's outline."""
        seen = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
        depth = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
        seen.flat[prepared.point_pixel] = True
        depth.flat[prepared.point_pixel] = prepared.points[:, 2]
        return cls.between(prepared.image[0].mean(axis=0), depth, seen)

    @classmethod
    def between(
        cls,
        grey: npt.NDArray[np.floating[Any]],
        depth: npt.NDArray[np.floating[Any]],
        seen: npt.NDArray[np.bool_],
    ) -> "Edges":
        """The edges of a grey image and of a depth that is known where it was seen, [224, 224] each."""
        nearest = ndimage.distance_transform_edt(~seen, return_distances=False, return_indices=True)
        inside = ndimage.binary_erosion(seen, iterations=2)
        surface = np.where(inside, _strength(depth[tuple(nearest)]), 0.0)
        # Holes of a few pixels are the sensor's, not the part's.
        outline = _strength(
            ndimage.binary_opening(ndimage.binary_closing(seen, iterations=3), iterations=3) * 1.0
        )
        return cls(_strength(grey), np.maximum(surface, outline))


class Agreement:
    """The mean correlation of the edges of many frames, for every shift of the cloud."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = {name: np.zeros((2 * REACH + 1, 2 * REACH + 1)) for name in ("as it is", *MIRRORED)}

    def add(self, edges: Edges) -> None:
        """Take one frame in."""
        self.count += 1
        for name, total in self.sums.items():
            total += agreement(edges.rgb, edges.xyz[MIRRORED[name]] if name in MIRRORED else edges.xyz)

    def verdict(self) -> tuple[bool, str]:
        """Whether the cloud lies where the picture is, and in words what was found."""
        if not self.count:
            return True, "not judged: no frame can be prepared"
        window = {name: total / self.count for name, total in self.sums.items()}
        best = {name: float(values.max()) for name, values in window.items()}
        here = window["as it is"]
        at_place = float(here[REACH - 1 : REACH + 2, REACH - 1 : REACH + 2].max())
        if max(best.values()) < LEAST:
            return True, "not judged: picture and cloud have no edges in common"
        turned = max(MIRRORED, key=lambda name: best[name])
        if best[turned] > BETTER * max(best["as it is"], LEAST / BETTER):
            return (
                False,
                f"XYZ agrees with RGB when it is {turned} ({best[turned]:.2f} against {at_place:.2f})",
            )
        down, right = best_shift(here)
        if max(abs(down), abs(right)) > TOLERATED and best["as it is"] > BETTER * at_place:
            return False, (
                f"XYZ agrees with RGB when it is moved {right:+d} px across and {down:+d} px down on the {IMAGE_SIZE} "
                f"grid ({best['as it is']:.2f} against {at_place:.2f})"
            )
        return True, f"edges of XYZ and RGB agree where they are ({at_place:.2f})"


def agreement(rgb: Floats, xyz: Floats) -> Floats:
    """Pearson's correlation of edges for shifts of `xyz` of up to 16 px: [33, 33], no shift in the middle."""
    everywhere = _correlation(rgb, xyz)
    return np.roll(everywhere, (REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]


def best_shift(found: Floats) -> tuple[int, int]:
    """How far down and right the cloud has to be moved for the best agreement, pixels of the grid."""
    row, column = np.unravel_index(found.argmax(), found.shape)
    return int(row) - REACH, int(column) - REACH


def _strength(values: npt.NDArray[np.floating[Any]]) -> Floats:
    """Gradient magnitude, 1 at and above its 95th percentile."""
    gradient = np.hypot(ndimage.sobel(values, 0), ndimage.sobel(values, 1))
    gradient[[0, -1]] = gradient[:, [0, -1]] = 0
    top = np.percentile(gradient, 95) or gradient.max()
    return np.minimum(gradient / top, 1) if top else gradient


def _correlation(rgb: Floats, xyz: Floats) -> Floats:
    """Pearson's correlation of `rgb` and `xyz` moved by every shift, around the edges of the grid."""
    spread = rgb.std() * xyz.std() * rgb.size
    if not spread:
        return np.zeros_like(rgb)
    product = np.fft.rfft2(rgb - rgb.mean()) * np.conj(np.fft.rfft2(xyz - xyz.mean()))
    return np.asarray(np.fft.irfft2(product, s=rgb.shape) / spread)
