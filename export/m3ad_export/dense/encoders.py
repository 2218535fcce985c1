"""A detector's frozen encoders in plain eager PyTorch, on any device, and their features at every pixel of the grid."""

from torch import Tensor

from m3ad_export.dense.torch_ops import (
    distances,
    farthest_points,
    interpolated,
    pooled,
    three_nearest,
    upsampled,
)
from m3ad_export.detector import Detector


def xyz_tokens(detector: Detector, points: Tensor) -> tuple[Tensor, Tensor]:
    """Centres [G, 3] and tokens [G, D] of the groups of points [N, 3]."""
    assert detector.xyz
    config = detector.xyz.config
    centers = points[farthest_points(points, config.groups, config.min_norm_sq)]
    nearest = distances(centers, points).topk(config.group_size, dim=1, largest=False).indices
    return centers, detector.xyz(points[nearest] - centers[:, None], centers)


def dense_rgb(detector: Detector, image: Tensor) -> Tensor:
    """RGB features of every pixel: [50176, D]."""
    assert detector.rgb
    return upsampled(detector.rgb(image), detector.rgb.config.side)


def dense_xyz(detector: Detector, points: Tensor, point_pixel: Tensor) -> Tensor:
    """XYZ features of every pixel, zero where no point is near: [50176, D]."""
    centers, tokens = xyz_tokens(detector, points)
    return pooled(interpolated(tokens, *three_nearest(points, centers)), point_pixel)


def dense_features(
    detector: Detector, image: Tensor, points: Tensor, point_pixel: Tensor
) -> tuple[Tensor, Tensor]:
    """Both modalities' features of every pixel."""
    return dense_rgb(detector, image), dense_xyz(detector, points, point_pixel)
