"""The case table: every implementation of the ops is run against the NumPy reference on these clouds."""

from dataclasses import dataclass

import numpy as np
from m3ad_plugins.arrays import Float32, Int32


@dataclass(frozen=True)
class Case:
    """One cloud: points [N, 3] on pixels [N] of an image_size grid, G samples, S neighbours."""

    name: str
    points: Float32
    point_pixel: Int32
    num_samples: int
    group_size: int
    image_size: int = 224
    min_norm_sq: float = 0.0

    def __str__(self) -> str:
        return self.name


def organised(seed: int, image_size: int, keep: int, depth_m: float = 0.4) -> tuple[Float32, Int32]:
    """A bumpy surface seen by a camera: `keep` of its pixels, what is missing lies mostly in two blobs."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:image_size, :image_size].reshape(2, -1)
    x, y = (u / image_size - 0.5) * 0.2, (v / image_size - 0.5) * 0.2
    z = depth_m + 0.01 * np.sin(30 * x) * np.cos(25 * y) + rng.normal(0, 2e-4, len(x))
    points = np.stack([x, y, z], 1).astype(np.float32)
    hole = np.minimum(np.hypot(u - image_size * 0.3, v - image_size * 0.6), np.hypot(u, v - image_size * 0.1))
    order = np.argsort(-hole + rng.uniform(0, image_size * 0.05, len(hole)), kind="stable")
    pixel = np.sort(order[:keep]).astype(np.int32)
    return points[pixel], pixel


def scattered(points: Float32, image_size: int, seed: int) -> Int32:
    """Distinct random pixels for points that have none of their own, in no order."""
    pixels = np.random.default_rng(seed).permutation(image_size * image_size)
    return pixels[: len(points)].astype(np.int32)


def _cloud(name: str, points: Float32, samples: int, group: int, image_size: int = 64, **kw: float) -> Case:
    return Case(name, points, scattered(points, image_size, 7), samples, group, image_size, **kw)


def _small() -> list[Case]:
    rng = np.random.default_rng(3)
    normal = rng.normal(0, 1, (600, 3)).astype(np.float32)
    grid = np.stack(np.meshgrid(*[np.arange(8)] * 3), -1).reshape(-1, 3).astype(np.float32)
    line = (rng.permutation(400)[:, None] * np.array([[1, 2, 0]])).astype(np.float32)
    row = np.arange(64, dtype=np.int32)
    in_row = np.stack([row * 0.001, row * 0, row * 0 + 0.5], 1).astype(np.float32)
    metres, metres_pixel = organised(1, 64, 1500)
    return [
        _cloud("random", normal, 128, 32),
        _cloud("ties: integer grid", grid, 200, 32),
        _cloud("duplicates", np.repeat(normal[:40], 10, axis=0), 64, 32),
        _cloud("all points equal", np.full((50, 3), 0.4, np.float32), 8, 50),
        _cloud("N = G", normal[:96], 96, 16),
        _cloud("N = S", normal[:33], 5, 33),
        _cloud("collinear", line, 100, 32),
        _cloud("coplanar", normal * np.float32([1, 1, 0]), 100, 32),
        _cloud("three points", normal[:3], 3, 3, 8),
        Case("one row", in_row, row + 64 * 20, 16, 8, 64),
        Case("one column", in_row[:30], row[:30] * 64, 16, 8, 64),
        Case("0.4 m, holes", metres, metres_pixel, 256, 32, 64),
        Case("centred, holes", metres - metres.mean(0), metres_pixel, 256, 32, 64),
        Case("full grid", *organised(2, 32, 32 * 32), 128, 32, 32),
        Case("points not in pixel order", metres[::-1].copy(), metres_pixel[::-1].copy(), 256, 32, 64),
        _cloud("skip near origin", normal, 64, 8, min_norm_sq=1.0),
        _cloud("skip all but few", normal, 64, 8, min_norm_sq=9.0),
        _cloud("large coordinates", normal * 1000 + np.float32(5000), 100, 32),
    ]


def _full() -> list[Case]:
    return [
        Case(f"N = {count}", *organised(count, 224, count), 1024, 32) for count in (1024, 1025, 17000, 50176)
    ]


SMALL = _small()
FULL = _full()
