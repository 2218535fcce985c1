"""What a sensor did not measure: the one rule for holes, and numbers that stand for a hole without being declared."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from m3ad.errors import FrameError

ZeroRule = Literal["point", "any_coordinate"]

ROUNDING = 1e-6  # of a declared value: what float32 and a unit's factor leave of it
# A repeated value this many times the cloud's own size away from all others is no surface that the sensor saw...
FAR = 20.0
# ...nor is one twice as far as the cloud and its own points are wide, where a share of the points carries it: a floor
# at z = 0 beneath a part lies nearer than the floor is wide.
NEAR, NEAR_SHARE = 2.0, 0.001


def measured(xyz: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
    """[...] True where a point of xyz [..., 3] was measured: finite, and not (0, 0, 0)."""
    return np.isfinite(xyz).all(axis=-1) & (xyz != 0).any(axis=-1)  # type: ignore[no-any-return]


def holes_as_zeros(
    xyz: npt.NDArray[np.float32], hole: float | None, zero_rule: ZeroRule
) -> npt.NDArray[np.float32]:
    """The cloud [..., 3] with every declared hole as (0, 0, 0); the same array when nothing is declared.

    Args:
        xyz: metres.
        hole: a point with a coordinate of this value is a hole.
        zero_rule: `any_coordinate` makes a point with one zero coordinate a hole, as CFM's loader does.
    """
    declared = np.zeros(xyz.shape[:-1], np.bool_)
    if hole is not None:
        bound = np.finfo(np.float32).max
        ends = np.clip([hole * (1 - ROUNDING), hole * (1 + ROUNDING)], -bound, bound).astype(np.float32)
        declared |= ((xyz >= ends.min()) & (xyz <= ends.max())).any(axis=-1)
    if zero_rule == "any_coordinate":
        declared |= (xyz == 0).any(axis=-1)
    return np.where(declared[..., None], np.float32(0), xyz) if declared.any() else xyz


def require_declared_holes(name: str, points: npt.NDArray[np.float32], hole: float | None) -> None:
    """Refuse a frame in which a number that nobody declared stands for holes.

    Args:
        name: the frame's.
        points: [M, 3] the measured ones.
        hole: the declared value; where there is one, only values far beyond any surface are refused.

    Raises:
        FrameError: one exactly repeated value lies far from all others.
    """
    columns = points.T.astype(np.float64)  # the largest float32 must not overflow
    for axis, column in enumerate(columns):
        for value in (column.min(), column.max()) if len(column) else ():
            same = column == value
            if same.sum() > 1 and _is_no_surface(columns, axis, same, value, hole is None):
                number = str(np.float32(value)).removesuffix(".0")
                raise FrameError(
                    f"frame {name}: {same.sum()} of {len(column)} points have {'xyz'[axis]} = {number}, far from all "
                    f"others, as if it stood for holes; declare it with --hole {number} in m3ad-export train, or write "
                    "holes as NaN or (0, 0, 0)"
                )


def _is_no_surface(
    columns: npt.NDArray[np.float64], axis: int, same: npt.NDArray[np.bool_], value: float, with_near: bool
) -> bool:
    """Whether the points `same`, at `value` on an axis, lie too far from the others to be a surface."""
    rest = columns[axis][~same]
    if not len(rest):
        return False
    gap = np.abs(rest - value).min()
    if gap < 0.1 * np.ptp(columns[axis]):  # nearly every cloud: something lies beside it
        return False
    wide = max(_spread(column[~same]) for column in columns)
    if gap > FAR * wide:
        return True
    others = [column[column != value] for i, column in enumerate(columns) if i != axis]
    lateral = max((_spread(other) for other in others if len(other)), default=0.0)
    return with_near and same.mean() >= NEAR_SHARE and bool(gap > NEAR * max(wide, lateral))


def _spread(values: npt.NDArray[np.float64]) -> float:
    low, high = np.percentile(values, (1, 99))
    return float(high - low)
