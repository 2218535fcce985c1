"""Frames of a line for the tests of drift: a plate on a tray, painted where its ribs are, and ways to spoil it."""

from collections.abc import Callable

import numpy as np
from m3ad.frames import Frame
from m3ad_calibrate import disturb

SIZE = 160


def plate(seed: int) -> Frame:
    """A plate of 12 mm with ribs on a tray 0.5 m away; it lies a little otherwise each time."""
    rng = np.random.default_rng(seed)
    v, u = np.indices((SIZE, SIZE))
    top, left = rng.integers(24, 28, 2)
    part = (v >= top) & (v < 130) & (u >= left) & (u < 126) & ~((v < 70) & (u > 80))
    rib = part & (((u - left) // 17 + (v - top) // 29) % 3 == 0)
    z = 0.5 - 0.012 * part - 0.004 * rib + rng.normal(0, 5e-5, part.shape)
    xyz = np.stack([(u - 80) / 800, (v - 80) / 800, z], axis=-1).astype(np.float32)
    xyz[rng.random(part.shape) < 0.01] = np.nan
    grey = 40 + 110 * part - 50 * rib + rng.normal(0, 3, part.shape) + rng.normal(0, 1)
    rgb = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    return Frame(rgb, xyz, f"plate {seed}")


def spoiled(change: disturb.Change, level: float) -> Callable[[Frame], Frame]:
    return lambda frame: change(frame, level, np.random.default_rng(0))


# The reason that each way has, and what does it.
WAYS: dict[str, tuple[str, Callable[[Frame], Frame]]] = {
    "darker": ("brightness", spoiled(disturb.light, 0.75)),
    "brighter": ("brightness", spoiled(disturb.light, 1.33)),
    "blurred": ("focus", spoiled(disturb.blur, 2)),
    "full of holes": ("coverage", spoiled(disturb.missing_points, 15)),
    "tilted": ("plane", spoiled(disturb.tilt, 3)),
    "image moved": ("registration", spoiled(disturb.misregistration, 4)),
}
