"""Synthetic defects on good frames, with known masks: a precision plan may be tuned on them, never on test labels.

A blotch of another colour, or a bump or dent along the line of sight. They are no model of real defects; they only have
to be seen by the detector, so that a plan's quality shows.
"""

import numpy as np
import numpy.typing as npt
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad.holes import measured

RADIUS = (0.05, 0.09)  # of the frame's shorter side
COLOUR_STRENGTH = 0.6
HEIGHT = (0.02, 0.04)  # of the part's diagonal
KINDS = ("colour", "geometry")


def with_defect(frame: Frame, seed: int) -> tuple[Frame, npt.NDArray[np.bool_]]:
    """Put one defect on a good frame.

    d = exp(-(|p - c| / r)^4) around a foreground pixel c;  rgb += 0.6 d (colour - rgb), or x += d h x / |x|   (ours)

    Args:
        frame: of a good part, its declared holes marked (`preprocess.with_holes`).
        seed: of the place, the size and the strength; even ones are blotches, odd ones bumps or dents.

    Returns:
        The frame with the defect, and its mask [H, W], True where d > 1/2 on the part.

    Raises:
        FrameError: the frame shows no part.
    """
    rng = np.random.default_rng(seed)
    part = measured(frame.xyz)
    if not part.any():
        raise FrameError(f"frame {frame.name} shows no part to put a defect on")
    height, width = part.shape
    rows, columns = np.nonzero(part)
    # The middle half of the part, so that the defect lies on it and not beside it.
    inner = np.abs(rows - np.median(rows)) + np.abs(columns - np.median(columns)) < min(height, width) / 3
    chosen = rng.choice(np.flatnonzero(inner) if inner.any() else len(rows))
    radius = rng.uniform(*RADIUS) * min(height, width)
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - rows[chosen], x - columns[chosen]) / radius
    blob = np.exp(-(distance**4)).astype(np.float32) * part
    rgb, xyz = frame.rgb, frame.xyz
    if seed % 2 == 0:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        mixed = rgb + COLOUR_STRENGTH * blob[..., None] * (colour - rgb)
        rgb = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
    else:
        points = xyz[part]
        diagonal = float(np.linalg.norm(np.percentile(points, 95, axis=0) - np.percentile(points, 5, axis=0)))
        height_m = rng.choice((-1.0, 1.0)) * rng.uniform(*HEIGHT) * diagonal
        sight = np.zeros_like(xyz)
        sight[part] = points / np.linalg.norm(points, axis=1, keepdims=True)
        xyz = np.where(part[..., None], xyz + np.float32(height_m) * blob[..., None] * sight, xyz)
    return Frame(rgb, xyz, f"{frame.name} + {KINDS[seed % 2]}"), blob > 0.5
