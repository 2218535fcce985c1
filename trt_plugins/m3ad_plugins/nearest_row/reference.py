"""The specification of NearestRow in plain NumPy: every other form is tested against it. Unchecked and slow."""

import numpy as np

from m3ad_plugins.arrays import Float32, Int32


def nearest_row(x: Float32, bank: Float32) -> tuple[Float32, Int32]:
    """min_b |x_q - b| and the lowest row that has it; differences and sums in fp64."""
    rows = bank.astype(np.float64)
    distance, idx = np.empty(len(x), np.float32), np.empty(len(x), np.int32)
    for q, query in enumerate(x.astype(np.float64)):
        squares = ((rows - query) ** 2).sum(axis=1)
        idx[q] = squares.argmin()
        distance[q] = np.sqrt(squares[idx[q]])
    return distance, idx
