"""Frames of random tokens whose scored pixels form a disc, as the feature cache would give them."""

from dataclasses import dataclass

import numpy as np
import torch
from m3ad.scored import scored_pixels
from m3ad_export.train.features import FrameFeatures
from m3ad_plugins import ops
from m3ad_runtime.stages import bilinear_operator


def disc(radius: float, row: float = 111.5, column: float = 111.5) -> np.ndarray:
    y, x = np.mgrid[:224, :224]
    return np.flatnonzero((y - row) ** 2 + (x - column) ** 2 < radius**2).astype(np.int32)


def frame_of(
    pixel: np.ndarray, *, groups: int, rgb_width: int, xyz_width: int, side: int = 8, seed: int = 0
) -> FrameFeatures:
    """A dome over these pixels with the real interpolation operators; its tokens are random."""
    rng = np.random.default_rng(seed)
    y, x = np.divmod(pixel, 224)
    z = 0.4 + 1e-6 * ((y - 112) ** 2 + (x - 112) ** 2)
    points = np.stack([(x - 112) * 5e-4, (y - 112) * 5e-4, z], axis=1).astype(np.float32)
    centers = points[ops.farthest_point_sample(points, groups)]
    xyz = ops.interpolation_operator(points, pixel, centers, scored_pixels(pixel))
    return FrameFeatures(
        rng.standard_normal((side * side, rgb_width), np.float32),
        rng.standard_normal((groups, xyz_width), np.float32),
        bilinear_operator(side, xyz.scored_pixel),
        xyz,
        pixel,
    )


def all_rows(frame: FrameFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """rgb_features and xyz_features of all scored pixels."""
    count = len(frame.scored_pixel)
    return frame.rows(torch.arange(count))


@dataclass
class Cache:
    """In the place of a FeatureExtractor; a sample is the number of its frame."""

    frames: list[FrameFeatures]

    def key(self, sample: int) -> str:
        return str(sample)

    def __call__(self, sample: int) -> FrameFeatures:
        return self.frames[sample]
