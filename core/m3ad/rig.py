"""The rig: the plane that parts lie on, how far it is and how much of it is seen; found once, checked on later frames.

`plane` alone fits one frame. Here the planes of several frames are brought to one, and a frame is told that it drifted.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3ad.bundle import write_json
from m3ad.errors import ArtifactError, FrameError
from m3ad.frames import Frame
from m3ad.holes import measured
from m3ad.plane import BORDER_PX, INLIER_M, Plane, border_points, distance_m, fit_plane, measured_area
from m3ad.typed_json import read_json, typed

FORMAT = "m3ad-rig"
ADVICE = "Calibrate it again: m3ad-calibrate rig"
# Below these a rig's own repeatability does not matter: half of what plane removal cuts, and 2.5 mm over 30 cm.
LEAST_OFFSET_M, LEAST_TILT_DEG = 0.0025, 0.5
SPREADS = 4.0  # how many times the spread among the calibration frames a later frame may lie off
LEAST_COVERAGE = 0.8  # of the least coverage among the calibration frames


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one frame says of the rig.

    Attributes:
        name: the frame's.
        plane: fitted to its border.
        residual_m: root mean square distance of the border points within 4 mm of that plane.
        distance_m: from the sensor to the plane.
        coverage: share of the frame's pixels with a point.
        area: (top, bottom, left, right) of what is measured, pixels.
    """

    name: str
    plane: Plane
    residual_m: float
    distance_m: float
    coverage: float
    area: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A calibrated rig, and what later frames are held against.

    Attributes:
        plane: (a, b, c, d) of ax + by + cz + d = 0, |(a, b, c)| = 1, metres.
        distance_m: from the sensor to the plane, the working distance.
        residual_m: median over the frames of their border's distance to this plane.
        offset_limit_m: how far a frame's plane may lie off at the middle of its border.
        tilt_limit_deg: how far it may be turned.
        coverage: the least share of pixels with a point among the frames that agreed.
        coverage_limit: what a later frame must have.
        frames: names of those that agreed.
        left_out: names of those that did not, or showed no plane.
    """

    plane: Plane
    distance_m: float
    residual_m: float
    offset_limit_m: float
    tilt_limit_deg: float
    coverage: float
    coverage_limit: float
    frames: list[str]
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """The rig as it stands in its file and in a bundle's manifest."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any, source: str) -> "Rig":
        """Read a rig back.

        Raises:
            ArtifactError: it is not a rig, or a value is missing, of another type or out of range.
        """
        expected = {field.name for field in fields(cls)} | {"format"}
        if not isinstance(values, dict) or values.get("format") != FORMAT or values.keys() != expected:
            raise ArtifactError(f"{source} is not a {FORMAT} of this m3ad. {ADVICE}")
        rig = typed(values, cls, source, ADVICE)
        limits = (rig.distance_m, rig.offset_limit_m, rig.tilt_limit_deg, rig.coverage_limit)
        if not all(map(math.isfinite, (*rig.plane, *limits))) or not any(rig.plane[:3]) or min(limits) < 0:
            raise ArtifactError(
                f"{source} is damaged: its plane is {rig.plane} and its limits are {limits}, expected a plane with a "
                f"normal and limits that are not negative. {ADVICE}"
            )
        return rig

    def write(self, path: Path) -> None:
        """Write the rig's file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())


def read_rig(path: Path) -> Rig:
    """Read a rig's file.

    Raises:
        ArtifactError: there is none, or it is no rig.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; write it with: m3ad-calibrate rig")
    return Rig.from_json(read_json(path, ADVICE), str(path))


def view(frame: Frame) -> View:
    """What a frame says of the rig: the plane of its border.

    Raises:
        FrameError: the border shows no plane.
    """
    seen = border_points(frame.xyz)
    try:
        plane = fit_plane(seen)
    except FrameError as error:
        raise FrameError(
            f"frame {frame.name} shows no support at its border, so the rig has no plane to find; give frames "
            f"in which it is seen, or use plane removal `none`"
        ) from error
    near = distance_m(seen, plane)
    near = near[near < INLIER_M]
    residual = math.sqrt(float(np.square(near).mean())) if len(near) else math.inf
    rows, cols = measured_area(measured(frame.xyz))
    return View(
        name=frame.name,
        plane=plane,
        residual_m=residual,
        distance_m=abs(plane[3]),
        coverage=float(measured(frame.xyz).mean()),
        area=(rows.start, rows.stop, cols.start, cols.stop),
    )


def fit_rig(frames: Sequence[Frame]) -> Rig:
    """One plane for a rig from empty or good frames.

    Each frame's border is fitted by RANSAC; the frame whose plane is the median of all starts, frames within 4 mm and
    one degree of it that measure the same area within 10 px agree, and the plane is fitted once more to their
    borders.   (ours)

    Args:
        frames: views of the same rig; a part may lie in the middle, the border shows the support.

    Raises:
        FrameError: there are none, none shows a plane, or fewer than half of them agree.
    """
    if not frames:
        raise FrameError("there are no frames to calibrate the rig with; give empty or good ones")
    seen = [_view_or_why(frame) for frame in frames]
    views = [v for v in seen if isinstance(v, View)]
    shown = [frame for frame, v in zip(frames, seen, strict=True) if isinstance(v, View)]
    if isinstance(seen[0], FrameError) and not views:
        raise seen[0]
    middle = _middle(shown[0])
    off = np.array([[plane_offset_m(a.plane, b.plane, middle) for a in views] for b in views])
    start = views[int(np.median(off, axis=1).argmin())].plane
    area = np.median([v.area for v in views], axis=0)
    # A nudged camera, a hand in the view, an area that was not measured.
    agree = [
        plane_offset_m(v.plane, start, middle) < INLIER_M
        and plane_tilt_deg(v.plane, start) < 1
        and np.abs(v.area - area).max() <= BORDER_PX
        for v in views
    ]
    if sum(agree) * 2 < len(frames) or not any(agree):
        raise FrameError(
            f"only {sum(agree)} of {len(frames)} frames show one plane within {INLIER_M * 1e3:g} mm and one degree; "
            f"a fixed plane needs a rig that stands still, use plane removal `ransac` for this one"
        )
    borders = [border_points(f.xyz) for f, is_in in zip(shown, agree, strict=True) if is_in]
    share = max(1, 20_000 // len(borders))
    plane = fit_plane(np.concatenate([b[:: max(1, len(b) // share)] for b in borders]))
    chosen = [v for v, is_in in zip(views, agree, strict=True) if is_in]
    offsets = [plane_offset_m(v.plane, plane, middle) for v in chosen]
    tilts = [plane_tilt_deg(v.plane, plane) for v in chosen]
    return Rig(
        plane=plane,
        distance_m=abs(plane[3]),
        residual_m=float(np.median([np.median(distance_m(b, plane)) for b in borders])),
        offset_limit_m=max(LEAST_OFFSET_M, SPREADS * float(np.sqrt(np.mean(np.square(offsets))))),
        tilt_limit_deg=max(LEAST_TILT_DEG, SPREADS * float(np.sqrt(np.mean(np.square(tilts))))),
        coverage=min(v.coverage for v in chosen),
        coverage_limit=LEAST_COVERAGE * min(v.coverage for v in chosen),
        frames=[v.name for v in chosen],
        left_out=[f.name for f in frames if f.name not in {v.name for v in chosen}],
    )


def _view_or_why(frame: Frame) -> View | FrameError:
    try:
        return view(frame)
    except FrameError as error:
        return error


def drift(rig: Rig, frame: Frame) -> list[str]:
    """In words how a frame no longer fits the rig; nothing when it does.

    Raises:
        FrameError: the frame's border shows no plane at all.
    """
    seen = view(frame)
    offset = plane_offset_m(seen.plane, rig.plane, _middle(frame))
    tilt = plane_tilt_deg(seen.plane, rig.plane)
    found = []
    if offset > rig.offset_limit_m:
        found.append(f"its plane lies {offset * 1e3:.1f} mm off, {rig.offset_limit_m * 1e3:.1f} mm is usual")
    if tilt > rig.tilt_limit_deg:
        found.append(f"its plane is turned by {tilt:.2f} degrees, {rig.tilt_limit_deg:.2f} is usual")
    if seen.coverage < rig.coverage_limit:
        found.append(
            f"only {seen.coverage:.0%} of its pixels have a point, {rig.coverage_limit:.0%} is the least"
        )
    return found


def _middle(frame: Frame) -> npt.NDArray[np.float64]:
    return np.asarray(border_points(frame.xyz).mean(axis=0), np.float64)


def plane_offset_m(a: Plane, b: Plane, at: npt.NDArray[np.float64]) -> float:
    """How far two planes lie apart at a place [3] of the first, along the second's normal, metres."""
    normal = np.array(a[:3])
    foot = at - (normal @ at + a[3]) * normal
    return abs(float(np.array(b[:3]) @ foot + b[3]))


def plane_tilt_deg(a: Plane, b: Plane) -> float:
    """The angle between two planes, degrees."""
    cosine = abs(float(np.dot(a[:3], b[:3])))
    return math.degrees(math.acos(min(1.0, cosine)))
