"""The custom ops as one writes them in plain PyTorch, on any device: what the dense form and CFM run on.

Same formulas as the references of `m3ad_plugins`; [N, G] matrices are formed as the formulas say. Of equal distances
to centres torch takes any, as in published code.
"""

import torch
import torch.nn.functional as F
from m3ad.contract import IMAGE_SIZE
from torch import Tensor

NEIGHBORS = 3
DISTANCE_EPS = 1e-8


def farthest_points(points: Tensor, count: int, min_norm_sq: float = 0.0) -> Tensor:
    """s_0 = 0, s_k = argmax_n min_{j<k} |p_n - p_{s_j}|^2: points [N, 3] -> idx [count] int64."""
    x, y, z = points.unbind(dim=1)
    closest = torch.full_like(x, torch.inf)
    if min_norm_sq > 0:
        closest[(x * x + y * y) + z * z <= min_norm_sq] = -1
    idx = torch.zeros(count, dtype=torch.long, device=points.device)
    for k in range(1, count):
        dx, dy, dz = (axis - axis[idx[k - 1]] for axis in (x, y, z))
        closest = torch.minimum(closest, (dx * dx + dy * dy) + dz * dz)
        idx[k] = closest.argmax()
    return idx


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Direct differences, never |a|^2 + |b|^2 - 2ab: [M, 3], [N, 3] -> [M, N] metres."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def three_nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The 3 nearest centres and their weights v_k / sum v, v_k = 1 / (d_k^2 + 1e-8): [N, 3] int64, [N, 3]."""
    distance, nearest = distances(points, centers).topk(NEIGHBORS, dim=1, largest=False)
    return nearest, normalised_inverse(distance.square())


def normalised_inverse(squared: Tensor) -> Tensor:
    """v / sum v, v = 1 / (d^2 + 1e-8): [N, 3] -> [N, 3]."""
    inverse = 1 / (squared + DISTANCE_EPS)
    return inverse / inverse.sum(dim=1, keepdim=True)


def interpolated(tokens: Tensor, nearest: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each point's 3 tokens: [G, D], [N, 3], [N, 3] -> [N, D]."""
    return (tokens[nearest] * weights[..., None]).sum(dim=1)


def pooled(rows: Tensor, point_pixel: Tensor) -> Tensor:
    """Rows at their pixels, zero elsewhere, 3 x 3 average to 222 and back to 224: [N, D] -> [50176, D]."""
    grid = rows.new_zeros(IMAGE_SIZE * IMAGE_SIZE, rows.shape[1])
    grid[point_pixel.long()] = rows
    grid = grid.T.reshape(1, -1, IMAGE_SIZE, IMAGE_SIZE)
    return _rows(F.adaptive_avg_pool2d(F.avg_pool2d(grid, 3, stride=1), IMAGE_SIZE))


def upsampled(rgb_tokens: Tensor, side: int) -> Tensor:
    """Bilinear, align_corners=False: [side * side, D] -> [50176, D]."""
    grid = rgb_tokens.T.reshape(1, -1, side, side)
    return _rows(F.interpolate(grid, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False))


def scored_pixels(point_pixel: Tensor) -> Tensor:
    """Pixels whose pooling window meets a foreground point, ascending: [N] -> [R] int64."""
    return pooled(torch.ones(len(point_pixel), 1, device=point_pixel.device), point_pixel)[:, 0].nonzero()[
        :, 0
    ]


def _rows(grid: Tensor) -> Tensor:
    return grid.flatten(2)[0].T
