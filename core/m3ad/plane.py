"""The plane a part lies on: a seeded RANSAC fit to the frame's border, in NumPy so that it repeats exactly.

CFM, M3DM and BTF fit it with Open3D (4 mm, unseeded: another plane at each call) and cut 5 mm around it.
Same constants and border here; samples are of 3 points, the best is refined by least squares on its inliers.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from m3ad.errors import FrameError
from m3ad.holes import measured

BORDER_PX = 10
DEAD_SHARE, FILLED_SHARE, COVERED_SHARE = 0.1, 0.98, 0.75
INLIER_M = 0.004
MIN_BORDER_POINTS = 50
MAX_BORDER_POINTS = 1024
CANDIDATES = 128  # with half of the border off the plane, all of them fail with probability 0.875^128 < 1e-7
MAX_REFITS = 20  # the inliers settle after a few

Plane = tuple[float, float, float, float]


def measured_area(seen: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of a frame that its sensor covers; the whole frame where no side of it is dead.

    Stereo and registered cameras measure nothing along some sides. A side is dead where its outer 10 px hold less than
    a tenth of the points; it ends at the first line that is half as full as the fullest.   (ours)

    Args:
        seen: [H, W], True where a point was measured.
    """
    found = []
    for axis in (0, 1):
        lines = seen if axis == 0 else seen.T
        count = lines.sum(axis=1)
        full = np.flatnonzero(2 * count >= max(int(count.max()), 1))
        first, last = (int(full[0]), int(full[-1])) if len(full) else (0, len(count) - 1)
        is_dead = [strip.mean() < DEAD_SHARE for strip in (lines[:BORDER_PX], lines[-BORDER_PX:])]
        found.append(slice(first if is_dead[0] else 0, last + 1 if is_dead[1] else len(count)))
    area = seen[found[0], found[1]]
    covers = all(side >= COVERED_SHARE * size for side, size in zip(area.shape, seen.shape, strict=True))
    inside, ring = np.count_nonzero(area), _ring(area)
    # What is smaller, or no rectangle, is a part that is seen without its support.
    if not covers or inside < FILLED_SHARE * np.count_nonzero(seen) or 2 * np.count_nonzero(ring) < len(ring):
        return slice(0, seen.shape[0]), slice(0, seen.shape[1])
    return found[0], found[1]


def border_points(xyz: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The measured points within 10 px of the edges of what a cloud [H, W, 3] measured; returns [M, 3] metres."""
    seen = measured(xyz)
    area = measured_area(seen)
    return np.asarray(_ring(xyz[area])[_ring(seen[area])])


def _ring(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values [H, W, ..] within 10 px of the edges, [M, ..]."""
    middle = values[BORDER_PX:-BORDER_PX]
    strips = (values[:BORDER_PX], values[-BORDER_PX:], middle[:, :BORDER_PX], middle[:, -BORDER_PX:])
    return np.concatenate([strip.reshape(-1, *values.shape[2:]) for strip in strips])


def fit_plane(points: npt.NDArray[np.floating[Any]], seed: int = 0) -> Plane:
    """Fit ax + by + cz + d = 0, |(a, b, c)| = 1, by RANSAC (4 mm), then least squares on the inliers.

    Args:
        points: [M, 3] metres, no holes, most of them on the plane; of many, 1024 evenly spread ones are used.
        seed: of the sampling; the same seed and points give the same plane.

    Raises:
        FrameError: fewer than 50 points, or all of them on one line.
    """
    if len(points) < MIN_BORDER_POINTS:
        raise FrameError(
            f"no plane can be fitted: the frame's border holds {len(points)} points, expected at least "
            f"{MIN_BORDER_POINTS}; use plane removal `none` for a part seen without its support"
        )
    points = points[:: -(-len(points) // MAX_BORDER_POINTS)].astype(np.float64)
    origin = points.mean(axis=0)  # centred, so that d does not cost precision
    centred = points - origin
    picks = np.random.default_rng(seed).integers(len(points), size=(CANDIDATES, 3))
    a, b, c = centred[picks].swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    lengths = np.linalg.norm(normals, axis=1)
    usable = lengths > 1e-12
    if not usable.any():
        raise FrameError(
            "no plane can be fitted: the points at the frame's border lie on one line; "
            "use plane removal `none` for a part seen without its support"
        )
    normals = normals[usable] / lengths[usable, None]
    offsets = np.einsum("kd,kd->k", normals, a[usable])
    counts = np.count_nonzero(np.abs(centred @ normals.T - offsets) < INLIER_M, axis=0)
    best = int(counts.argmax())
    normal, offset = normals[best], offsets[best]
    near = np.zeros(len(points), np.bool_)
    for _ in range(MAX_REFITS):
        before, near = near, np.abs(centred @ normal - offset) < INLIER_M
        if np.array_equal(near, before):
            break
        mean = centred[near].mean(axis=0)
        normal = np.linalg.eigh(np.cov(centred[near].T))[1][:, 0]  # direction of least variance
        offset = normal @ mean
    sign = np.sign(normal[np.abs(normal).argmax()])  # eigenvectors have no sign of their own
    x, y, z = (sign * normal).tolist()
    return x, y, z, float(-sign * (normal @ origin + offset))


def distance_m(points: npt.NDArray[np.float32], plane: Plane) -> npt.NDArray[np.float64]:
    """|n . p + d| / |n| for points [..., 3]; the plane need not be normalised."""
    normal = np.array(plane[:3])
    return np.abs(points @ normal + plane[3]) / np.linalg.norm(normal)  # type: ignore[no-any-return]
