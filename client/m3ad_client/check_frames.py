"""What is wrong with somebody's frames before a detector is trained on them: one row a check."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from m3ad.contract import IMAGE_SIZE, MIN_POINTS
from m3ad.errors import FrameError
from m3ad.foreground import FARTHEST_M
from m3ad.frame_settings import Preprocessing
from m3ad.frames import SPLITS, Frame, Sample, find_pairs, find_samples, is_category, read_sample
from m3ad.holes import measured
from m3ad.plane import INLIER_M, Plane, border_points, distance_m, fit_plane
from m3ad.preprocess import prepare, with_holes
from m3ad.registration import Agreement, Edges
from m3ad.scale import OTHER_UNIT, extent

LARGEST_PART_M = 3.0  # of what a camera on a line looks at; parts that are larger are in another unit
LEAST_COVERAGE = 0.5  # of the usual number of foreground points
ON_PLANE = 0.5  # of the border's points; a support that is seen
TILT_COSINE = float(np.cos(np.deg2rad(1)))
SHOWN = 3
NOT_JUDGED = "not judged: no frame is left that can be read, with its holes declared"


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, whether it is as it should be, what was found, and the frames it was found in."""

    name: str
    is_ok: bool
    found: str
    frames: tuple[str, ...] = ()

    def cells(self) -> list[str]:
        """The row of a table."""
        named = ", ".join(self.frames[:SHOWN])
        more = f" and {len(self.frames) - SHOWN} more" if len(self.frames) > SHOWN else ""
        return [self.name, "ok" if self.is_ok else "WRONG", self.found, named + more]


@dataclass(slots=True)
class Facts:
    """What is kept of one frame."""

    name: str
    digests: tuple[str, str] = ("", "")
    size: tuple[int, int] = (0, 0)
    failed: dict[str, str] = field(default_factory=dict)  # check -> its sentence
    hole_share: float = 0.0
    points: int = 0
    extent_m: float | None = None
    far_m: float = 0.0
    plane: Plane | None = None


def check_frames(
    folder: Path, *, hole: float | None = None, track: Callable[[Sequence[Sample]], Iterable[Sample]] = iter
) -> list[Check]:
    """Look at every frame of a category or of a plain folder.

    Args:
        folder: in any layout that training or inspection reads.
        hole: a number that stands for `not measured`.
        track: shows progress.

    Raises:
        FrameError: the folder holds no frames at all.
    """
    samples, splits = _samples(folder)
    settings, agreement = Preprocessing(hole=hole), Agreement()
    facts = [_facts(sample, settings, agreement) for sample in track(samples)]
    read = [f for f in facts if "files" not in f.failed]
    return [
        _sentences("files", facts, f"{len(facts)} frames can be read"),
        _sizes(read),
        _holes(read),
        _units(read),
        _coverage(read),
        _registration(agreement),
        _plane(read),
        _duplicates(read),
        splits,
    ]


def _samples(folder: Path) -> tuple[list[Sample], Check]:
    """All frames, and what is to be said of their splits."""
    if not is_category(folder):
        return find_pairs(folder), Check("splits", True, "none: a plain folder, for inspection only")
    tried = {split: _split(folder, split) for split in SPLITS}
    found = {split: samples for split, samples in tried.items() if isinstance(samples, list)}
    wrong = [str(error) for error in tried.values() if isinstance(error, FrameError)]
    samples = [sample for split in found.values() for sample in split]
    if not samples:
        raise FrameError(wrong[0])
    kinds = Counter(s.defect for s in found.get("test", ()))
    if kinds and (len(kinds) < 2 or "good" not in kinds):
        wrong.append(f"test has {', '.join(kinds)} only; metrics need good and defective parts")
    unmarked = [s.name for s in samples if not s.is_good and s.mask_path is None]
    told = ", ".join(f"{len(s)} {split}" for split, s in found.items())
    drawn = f"; {len(unmarked)} defective parts have no mask, so no metrics by pixel" if unmarked else ""
    return samples, Check("splits", not wrong, "; ".join(wrong) or f"{told}{drawn}")


def _split(folder: Path, split: str) -> list[Sample] | FrameError:
    try:
        return find_samples(folder, split)
    except FrameError as error:
        return error


def _facts(sample: Sample, settings: Preprocessing, agreement: Agreement) -> Facts:
    facts = Facts("/".join(filter(None, (sample.split, sample.defect, sample.name))))
    try:
        frame = read_sample(sample)
    except FrameError as error:
        facts.failed["files"] = str(error)
        return facts
    facts.size = frame.rgb.shape[1], frame.rgb.shape[0]
    facts.digests = (
        hashlib.sha256(frame.rgb.tobytes()).hexdigest(),
        hashlib.sha256(frame.xyz.tobytes()).hexdigest(),
    )
    try:
        frame = with_holes(frame, settings)
    except FrameError as error:
        facts.failed["holes"] = str(error)
        return facts
    seen = measured(frame.xyz)
    facts.hole_share = 1 - float(seen.mean())
    if not seen.any():
        return facts
    points = frame.xyz[seen]
    facts.extent_m, facts.far_m = extent(points), float(np.median(np.abs(points).max(axis=1)))
    facts.plane = _support(frame)
    try:
        prepared = prepare(frame, settings)
    except FrameError:
        return facts  # too few points or too far away, which other rows say
    facts.points = len(prepared.points)
    agreement.add(Edges.of(prepared))
    return facts


def _support(frame: Frame) -> Plane | None:
    """The plane that most of the border lies on, if there is one."""
    border = border_points(frame.xyz)
    try:
        plane = fit_plane(border)
    except FrameError:
        return None
    return plane if (distance_m(border, plane) < INLIER_M).mean() >= ON_PLANE else None


def _sentences(name: str, facts: Sequence[Facts], fine: str) -> Check:
    failed = [f for f in facts if name in f.failed]
    if not failed:
        return Check(name, True, fine)
    return Check(name, False, failed[0].failed[name], tuple(f.name for f in failed))


def _sizes(facts: Sequence[Facts]) -> Check:
    sizes = Counter(f.size for f in facts)
    told = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common())
    usual = sizes.most_common(1)[0][0] if sizes else (0, 0)
    other = tuple(f.name for f in facts if f.size != usual)
    small = f"; the detectors see {IMAGE_SIZE}x{IMAGE_SIZE}" if 0 < max(usual) < IMAGE_SIZE else ""
    return Check("sizes", not other, f"{told or 'none'}{small}", other)


def _holes(facts: Sequence[Facts]) -> Check:
    shares = [f.hole_share for f in facts if "holes" not in f.failed]
    fine = f"{np.median(shares):.0%} of a frame's pixels, at most {max(shares):.0%}" if shares else ""
    return _sentences("holes", facts, fine)


def _units(facts: Sequence[Facts]) -> Check:
    sized = [f for f in facts if f.extent_m]
    if not sized:
        return Check("units", True, NOT_JUDGED)
    usual = float(np.median([f.extent_m for f in sized if f.extent_m]))
    if usual > LARGEST_PART_M or np.median([f.far_m for f in sized]) > FARTHEST_M:
        return Check(
            "units",
            False,
            f"the points of a frame are {usual:.3g} m across; if these are millimetres, divide by 1000",
        )
    other = [f for f in sized if f.extent_m and not 1 / OTHER_UNIT <= f.extent_m / usual <= OTHER_UNIT]
    if other:
        found = f"some are {other[0].extent_m:.3g} m across, {usual:.3g} m is usual: another unit"
        return Check("units", False, found, tuple(f.name for f in other))
    return Check("units", True, f"metres: the points of a frame are {usual:.3g} m across")


def _coverage(facts: Sequence[Facts]) -> Check:
    counts = [f.points for f in facts if f.points]
    usual = int(np.median(counts)) if counts else 0
    least = max(MIN_POINTS, LEAST_COVERAGE * usual)
    few = [f for f in facts if f.points < least and "holes" not in f.failed]
    told = f"{usual} foreground points on the {IMAGE_SIZE} x {IMAGE_SIZE} grid are usual"
    if not few:
        return Check("coverage", True, told if counts else NOT_JUDGED)
    fewest = min(f.points for f in few)
    return Check("coverage", False, f"{told}, {fewest} are the fewest", tuple(f.name for f in few))


def _registration(agreement: Agreement) -> Check:
    is_ok, found = agreement.verdict()
    return Check("registration", is_ok, found)


def _plane(facts: Sequence[Facts]) -> Check:
    seen = [f for f in facts if f.plane]
    if not seen:
        return Check("plane", True, "no support is seen at the border: train with --plane none")
    if len(seen) < len(facts):
        blind = tuple(f.name for f in facts if not f.plane)
        return Check(
            "plane", False, f"{len(seen)} of {len(facts)} frames show their support, the others not", blind
        )
    planes = np.array([f.plane for f in seen])
    middle = np.median(planes, axis=0)
    middle /= np.linalg.norm(middle[:3])
    apart = np.abs(planes[:, 3] - middle[3]) > INLIER_M
    turned = planes[:, :3] @ middle[:3] < TILT_COSINE
    if not (apart | turned).any():
        return Check(
            "plane", True, f"one for all, {abs(middle[3]):.3g} m away: --plane fixed, with m3ad-calibrate rig"
        )
    return Check(
        "plane", True, "each frame has its own: --plane ransac, or none where the part fills the frame"
    )


def _duplicates(facts: Sequence[Facts]) -> Check:
    owners: dict[str, list[str]] = {}
    for f in facts:
        for digest in f.digests:
            owners.setdefault(digest, []).append(f.name)
    same = [names for names in owners.values() if len(names) > 1]
    if not same:
        return Check("duplicates", True, "no picture and no cloud is there twice")
    names = tuple(dict.fromkeys(name for group in same for name in group))
    crossing = any(len({name.partition("/")[0] for name in group}) > 1 for group in same)
    across = "; some are in two splits, so that a test would know its frames" if crossing else ""
    return Check("duplicates", False, f"{_counted(len(same))} there twice{across}", names)


def _counted(count: int) -> str:
    return "1 picture or cloud is" if count == 1 else f"{count} pictures or clouds are"


def failing(checks: Sequence[Check]) -> list[str]:
    """The names of the checks that failed."""
    return [check.name for check in checks if not check.is_ok]
