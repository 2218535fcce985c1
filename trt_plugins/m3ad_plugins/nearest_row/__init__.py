"""NearestRow: how far each query lies from its nearest row of a bank, and which row that is."""

import numpy as np

from m3ad_plugins import native
from m3ad_plugins.arrays import Float32, Int32, checked
from m3ad_plugins.nearest_row.reference import nearest_row as in_numpy


def nearest_row(x: Float32, bank: Float32) -> tuple[Float32, Int32]:
    """Each query's distance to its nearest row of a bank.

    delta_q = min_b |x_q - b|, in fp64 and rounded once; ties go to the lowest row   (PatchCore, Roth et al. 2022)

    Args:
        x: [Q, D] float32.
        bank: [B, D] float32.

    Returns:
        distance [Q] float32 in the unit of the rows, idx [Q] int32.

    Raises:
        ValueError: an argument is not as described.
    """
    x = checked("x", x, "float32", ("Q", "D"))
    bank = checked("bank", bank, "float32", ("B", x.shape[1]))
    if not len(bank):
        raise ValueError("bank: expected at least 1 row, got 0")
    return native.choose(in_cpp, in_numpy)(x, bank)


def in_cpp(x: Float32, bank: Float32) -> tuple[Float32, Int32]:
    """The portable C++; inputs are already checked."""
    distance, idx = np.empty(len(x), np.float32), np.empty(len(x), np.int32)
    native.call("nearest_row", "piipippi", x, *x.shape, bank, len(bank), distance, idx, native.threads())
    return distance, idx
