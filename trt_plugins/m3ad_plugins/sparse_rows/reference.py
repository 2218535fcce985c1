"""The specification of `cosine_scores` in plain NumPy: every other form is tested against it. Unchecked and slow."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3ad_plugins.arrays import Float32


def cosine_scores(features: Sequence[Float32], reconstructed: Sequence[Sequence[Float32]]) -> Float32:
    """|F/|F| - F~/|F~||^2 / 2 of each pair, in fp64."""

    def unit(rows: Float32) -> NDArray[np.float64]:
        norm = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(norm, 1e-12))

    pairs = zip(features, map(np.hstack, reconstructed), strict=True)
    return np.stack([((unit(a) - unit(b)) ** 2).sum(1) / 2 for a, b in pairs]).astype(np.float32)
