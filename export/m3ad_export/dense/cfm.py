"""CFM's published graph: its own grouping and interpolation, its two mappings on every pixel, its scoring.

References:
    CFM (Costanzino et al. 2024)  https://github.com/CVLAB-Unibo/crossmodal-feature-mapping
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from torch import Tensor

from m3ad_export.dense.torch_ops import (
    farthest_points,
    interpolated,
    normalised_inverse,
    pooled,
    scored_pixels,
    upsampled,
)
from m3ad_export.detector import Detector
from m3ad_export.heads.mappings import Mappings
from m3ad_export.heads.mentor import Mapping
from m3ad_export.heads.voting import smooth


def random_mappings(detector: Detector) -> Mappings:
    """Untrained mappings of the detector's widths, which cost what trained ones do."""
    rgb, xyz = detector.encoders
    widths = rgb.config.token_width, xyz.config.token_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        to_xyz, to_rgb = Mapping(*widths), Mapping(*widths[::-1])
    device = next(rgb.parameters()).device
    return Mappings(to_xyz, to_rgb).to(device).requires_grad_(False)


def published(detector: Detector, maps: Mappings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """CFM on the detector's encoders.

    m = f(|unit F~_RGB - unit F_RGB| |unit F~_XYZ - unit F_XYZ|), without CFM's division by sqrt(mean), which changes no
    rank within an image: the bundle's map.
    """
    rgb_encoder, xyz_encoder = detector.encoders
    config = xyz_encoder.config

    def grouped(points: Tensor) -> tuple[Tensor, Tensor]:
        centers = points[farthest_points(points, config.groups, config.min_norm_sq)]
        distance = torch.norm(points[:, None] - centers[None], dim=2)  # [N, G, 3] is formed, as published
        nearest = distance.topk(config.group_size, dim=0, largest=False).indices.T
        return points[nearest] - centers[:, None], centers

    def three(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        squared = (
            points.square().sum(1)[:, None] + centers.square().sum(1)[None] - 2 * points @ centers.T
        )  # the expanded form, and the whole row sorted, as published
        distance, order = squared.sort(dim=1)
        return order[:, :3], normalised_inverse(distance[:, :3])

    def run(image: Tensor, points: Tensor, point_pixel: Tensor) -> Tensor:
        rgb_tokens = rgb_encoder(image)
        neighborhood, centers = grouped(points)
        xyz_tokens = xyz_encoder(neighborhood, centers)
        rgb = upsampled(rgb_tokens, rgb_encoder.config.side)
        xyz = pooled(interpolated(xyz_tokens, *three(points, centers)), point_pixel)
        errors = [
            torch.linalg.vector_norm(F.normalize(found) - F.normalize(real), dim=1)
            for found, real in zip(maps(rgb, xyz), (rgb, xyz), strict=True)
        ]
        mask = torch.zeros_like(errors[0])
        mask[scored_pixels(point_pixel)] = 1
        product = (errors[0] * mask * errors[1] * mask).reshape(1, IMAGE_SIZE, IMAGE_SIZE)
        return smooth(product)[0]

    return run
