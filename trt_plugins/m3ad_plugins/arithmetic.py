"""The arithmetic of the ops as their references spell it, the Python of `common/arithmetic.hpp`.

Distances are direct fp32 differences summed as (dx*dx + dy*dy) + dz*dz, each step rounded; ties go to the lowest index.
"""

import numpy as np

from m3ad_plugins.arrays import Float32


def squared_distance(a: Float32, b: Float32) -> Float32:
    """|a - b|^2 over the last axis, which is xyz; the other axes broadcast."""
    x, y, z = (a[..., axis] - b[..., axis] for axis in range(3))
    return np.asarray((x * x + y * y) + z * z, np.float32)
