"""How large a part is, and which unit was taken for another when it is not as large as in training."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

UNIT_FACTORS = (10.0, 25.4, 39.37, 100.0, 1000.0)  # between mm, cm, inch and m
OTHER_UNIT = 5.0  # a part may be seen in part, but not this much smaller or larger


def extent(points: npt.NDArray[np.floating[Any]]) -> float:
    """Diagonal of the box around points [M, 3] that leaves 5 % of them out on each of its sides."""
    low, high = np.percentile(points, (5, 95), axis=0)
    return float(np.linalg.norm(high - low))


def unit_mistake(found_m: float, expected_m: float) -> str | None:
    """In words what to do with a cloud of this extent, or None where it may be the expected one in the same unit."""
    ratio = found_m / expected_m
    times = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    if times <= OTHER_UNIT:
        return None
    factor = min(UNIT_FACTORS, key=lambda f: abs(math.log(min(times, 1e9) / f)))
    fix = f"divide it by {factor:g}" if ratio > 1 else f"multiply it by {factor:g}"
    return (
        f"is {ratio:.3g} times as large as the training frames' ({found_m:.3g} m across, {expected_m:.3g} m is usual); "
        f"if xyz is in another unit, {fix}"
    )
