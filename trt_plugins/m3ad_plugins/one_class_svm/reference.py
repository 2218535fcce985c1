"""The specification of OneClassSvm in plain NumPy: every other form is tested against it. Unchecked and slow."""

import numpy as np

from m3ad_plugins.arrays import Float32


def one_class_svm(
    x: Float32,
    support_vectors: Float32,
    coefficients: Float32,
    rho: float,
    kernel: str = "linear",
    gamma: float = 1.0,
) -> Float32:
    """sum_k c_k k(v_k, x) - rho, k(v, x) = v.x or exp(-gamma |v - x|^2), in fp64."""
    x64, vectors = x.astype(np.float64), support_vectors.astype(np.float64)
    if kernel == "linear":
        gram = x64 @ vectors.T
    else:
        gram = np.stack([np.exp(-gamma * ((x64 - v) ** 2).sum(1)) for v in vectors], 1)
    return np.asarray(gram @ coefficients.astype(np.float64) - rho, np.float32)
