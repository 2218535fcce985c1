"""OneClassSvm: the decision function of a one-class SVM."""

import numpy as np

from m3ad_plugins import native
from m3ad_plugins.arrays import Float32, checked
from m3ad_plugins.one_class_svm.reference import one_class_svm as in_numpy

KERNELS = ("linear", "rbf")


def one_class_svm(
    x: Float32,
    support_vectors: Float32,
    coefficients: Float32,
    rho: float,
    kernel: str = "linear",
    gamma: float = 1.0,
) -> Float32:
    """The decision function of a one-class SVM.

    f(x) = sum_k c_k k(v_k, x) - rho, with k(v, x) = v.x or exp(-gamma |v - x|^2)   (Schoelkopf et al. 2001)

    Args:
        x: [R, D] float32.
        support_vectors: [K, D] float32.
        coefficients: [K] float32; their sign fixes which side is anomalous.
        rho: offset.
        kernel: "linear" or "rbf".
        gamma: width of the rbf kernel, positive.

    Returns:
        [R] float32.

    Raises:
        ValueError: an argument is not as described.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if not 0 < gamma < np.inf:
        raise ValueError(f"gamma: expected a finite value > 0, got {gamma}")
    x = checked("x", x, "float32", ("R", "D"))
    support_vectors = checked("support_vectors", support_vectors, "float32", ("K", x.shape[1]))
    coefficients = checked("coefficients", coefficients, "float32", (len(support_vectors),))
    return native.choose(in_cpp, in_numpy)(x, support_vectors, coefficients, rho, kernel, gamma)


def in_cpp(
    x: Float32, support_vectors: Float32, coefficients: Float32, rho: float, kernel: str, gamma: float
) -> Float32:
    """The portable C++; inputs are already checked."""
    decision = np.empty(len(x), np.float32)
    model = (support_vectors, coefficients, len(support_vectors), rho, int(kernel == "rbf"), gamma)
    rows = (x, *x.shape)
    native.call("one_class_svm", "piippififpi", *rows, *model, decision, native.threads())
    return decision
