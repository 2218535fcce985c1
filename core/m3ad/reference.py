"""How the good frames look that limits were set with, and in which way later frames no longer look so.

A later frame alone says little: parts differ. What is held against the reference is the median over a window of frames,
which half of them must share, and the bound is what single calibration frames show:

    bound = max(floor, 4 (1 + 4 / n) max(1.4826 MAD, s / 2))    of n calibration frames   (ours)

with the median absolute deviation MAD and the standard deviation s; few frames know their spread badly.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from m3ad.contract import IMAGE_SIZE
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.grid import grid_source, prepare_mask, squared
from m3ad.holes import measured
from m3ad.plane import Plane, border_points, fit_plane
from m3ad.preprocess import geometry, with_holes
from m3ad.registration import LEAST, TOLERATED, Edges, agreement, best_shift
from m3ad.rig import Rig, fit_rig, plane_offset_m, plane_tilt_deg
from m3ad.typed_json import typed

FORMAT = "m3ad-reference"
ADVICE = "Record it again: m3ad-calibrate threshold BUNDLE --data DATA"
Reason = Literal["brightness", "focus", "coverage", "plane", "registration", "score"]
REASONS: tuple[Reason, ...] = get_args(Reason)

LEAST_FRAMES = 5
RIG_FRAMES = 16  # whose clouds are kept at once to find the plane
SPREADS = 4.0
# How much better edges must agree at another place: less than where nothing is known of the right one, as here it is.
SURE = 1.05
FOCUS_PX = 1.0  # standard deviation before the Laplacian: less is the sensor's noise
# Below these nobody needs to be called: shares of the usual brightness and sharpness, of the pixels, of the way from
# the usual score to the limit of reject.
LEAST_BRIGHTNESS, LEAST_FOCUS, LEAST_COVERAGE, LEAST_SCORE = 0.05, 0.15, 0.03, 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What one frame says; None where it cannot say it.

    Attributes:
        brightness: mean grey value, 0..255.
        focus: standard deviation of the grey image's Laplacian of Gaussian over that of the grey image itself, so that
            light does not change it.
        coverage: share of the pixels with a point.
        support: the plane of the border, and the middle of the border's points.
        agreement: [33, 33], correlation of the edges of image and cloud over shifts.
        score: of the part.
    """

    brightness: float | None = None
    focus: float | None = None
    coverage: float | None = None
    support: tuple[Plane, npt.NDArray[np.float64]] | None = None
    agreement: npt.NDArray[np.float32] | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What is usual, and how far the median of a window may lie off."""

    usual: float
    bound: float

    @classmethod
    def of(cls, values: Sequence[float], floor: float) -> "Band":
        """The band of calibration frames' values."""
        found = np.asarray(values, np.float64)
        middle = float(np.median(found))
        spread = max(1.4826 * float(np.median(np.abs(found - middle))), float(found.std()) / 2)
        return cls(usual=middle, bound=max(floor, SPREADS * (1 + 4 / len(found)) * spread))


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """How far the calibration frames' clouds lie off their images on the 224 grid, pixels, and how well edges agree."""

    down: int
    right: int
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """How calibration frames look; None for what they do not show: a modality that is left out, a support, edges.

    Attributes:
        frames: how many there were.
    """

    frames: int
    brightness: Band | None
    focus: Band | None
    coverage: Band | None
    rig: Rig | None
    registration: Registration | None

    def to_json(self) -> dict[str, Any]:
        """The reference as it stands in a bundle's manifest."""
        return {"format": FORMAT, **asdict(self), "rig": self.rig.to_json() if self.rig else None}

    @classmethod
    def from_json(cls, values: Any, source: str) -> "Reference":
        """Read a reference back.

        Raises:
            ArtifactError: it is none, or a value is missing or of another type.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ArtifactError(f"{source} is not a {FORMAT} of this m3ad. {ADVICE}")
        rig = values.get("rig")
        plain = {name: value for name, value in values.items() if name not in ("format", "rig")}
        read = typed({**plain, "rig": None}, cls, source, ADVICE)
        return cls(
            frames=read.frames,
            brightness=read.brightness,
            focus=read.focus,
            coverage=read.coverage,
            rig=None if rig is None else Rig.from_json(rig, source),
            registration=read.registration,
        )


def look(frame: Frame, preprocessing: Preprocessing, score: float | None = None) -> Look:
    """What a frame says, of the pixels that count.

    Args:
        frame: as it came.
        preprocessing: the bundle's: declared holes, regions, a modality that is left out.
        score: of the part.

    Raises:
        FrameError: the frame is of another size than the regions.
    """
    height, width = frame.rgb.shape[:2]
    kept = preprocessing.regions.mask() if preprocessing.regions else None
    if kept is not None and kept.shape != (height, width):
        raise FrameError(f"frame {frame.name} is of another size than the bundle's regions")
    found: dict[str, Any] = {"score": score}
    grey = np.zeros((height, width), np.float32)
    for channel in range(3):
        grey += frame.rgb[..., channel]
    grey /= 3
    if preprocessing.without != "rgb":
        found["brightness"] = float(_of(grey, kept).mean())
        inside = None if kept is None else ndimage.binary_erosion(kept, iterations=4)
        if spread := float(_of(grey, inside).std()):
            found["focus"] = float(_of(ndimage.gaussian_laplace(grey, FOCUS_PX), inside).std()) / spread
    if preprocessing.without != "xyz":
        xyz = geometry(frame.xyz, preprocessing)
        found["coverage"] = float(_of(measured(xyz), kept).mean())
        border = border_points(xyz)
        with contextlib.suppress(FrameError):  # no support is seen
            found["support"] = fit_plane(border), border.mean(axis=0, dtype=np.float64)
        if preprocessing.without is None:
            found["agreement"] = agreement(*_edges(grey, xyz, kept)).astype(np.float32)
    return Look(**found)


def _of(values: npt.NDArray[Any], kept: npt.NDArray[np.bool_] | None) -> npt.NDArray[Any]:
    return values if kept is None or not kept.any() else values[kept]


def _edges(
    grey: npt.NDArray[np.float32], xyz: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Edges of image and cloud on the 224 grid, whatever grid the method has; none where pixels do not count."""
    height, width = grey.shape
    rows, cols = grid_source(height, width)
    inside = np.ix_((rows >= 0) & (rows < height), (cols >= 0) & (cols < width))
    cloud = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    cloud[inside] = xyz[np.ix_(rows[inside[0].ravel()], cols[inside[1].ravel()])]
    square = Image.fromarray(squared(np.rint(grey).astype(np.uint8)))
    picture = np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), np.float64)
    edges = Edges.between(picture, cloud[..., 2], measured(cloud))
    if kept is None:
        return edges.rgb, edges.xyz
    counts = prepare_mask(kept)
    return edges.rgb * counts, edges.xyz * counts


@dataclass(slots=True)
class Looks:
    """Collects what good calibration frames say, one at a time.

    Args:
        preprocessing: the bundle's.
        rig: the bundle's, if it has one; else the plane is found here, where the frames show one.
    """

    preprocessing: Preprocessing
    rig: Rig | None = None
    looks: list[Look] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    def add(self, frame: Frame) -> None:
        """Take in one good frame.

        Raises:
            FrameError: holes carry a number that is not declared, or see `look`.
        """
        self.looks.append(look(frame, self.preprocessing))
        if self.rig is None and self.preprocessing.without != "xyz" and len(self.frames) < RIG_FRAMES:
            self.frames.append(with_holes(frame, self.preprocessing))

    def reference(self) -> Reference | None:
        """The reference of what was taken in; None of fewer than five frames."""
        if len(self.looks) < LEAST_FRAMES:
            return None
        rig = self.rig
        if rig is None and self.frames:
            with contextlib.suppress(FrameError):  # no support is seen, or each part lies in another way
                rig = fit_rig(self.frames)
        return Reference(
            frames=len(self.looks),
            brightness=self._band("brightness", LEAST_BRIGHTNESS),
            focus=self._band("focus", LEAST_FOCUS),
            coverage=self._band("coverage", None),
            rig=rig,
            registration=self._registration(),
        )

    def _band(self, name: str, share: float | None) -> Band | None:
        values = [value for each in self.looks if (value := getattr(each, name)) is not None]
        if len(values) < LEAST_FRAMES:
            return None
        return Band.of(values, LEAST_COVERAGE if share is None else share * float(np.median(values)))

    def _registration(self) -> Registration | None:
        total = _agreement(self.looks)
        if total is None or total.max() < LEAST:
            return None
        down, right = best_shift(total)
        return Registration(down=down, right=right, agreement=float(total.max()))


def score_band(scores: Sequence[float], reject: float) -> Band | None:
    """The band of good validation parts' scores; None of fewer than five."""
    if len(scores) < LEAST_FRAMES:
        return None
    return Band.of(scores, LEAST_SCORE * abs(reject - float(np.median(scores))))


@dataclass(frozen=True, slots=True)
class Departure:
    """How far a window of frames lies off what is usual, over what is tolerated: drift above 1; and in words."""

    share: float
    told: str


def departures(
    reference: Reference, scores: Band | None, window: Sequence[Look]
) -> Mapping[Reason, Departure]:
    """How far later frames lie off the calibration frames, by each reason that both can speak of.

    Args:
        reference: the bundle's.
        scores: of its good validation parts.
        window: recent frames.
    """
    found: dict[Reason, Departure] = {}
    for name, band, words, ways in (
        (
            "brightness",
            reference.brightness,
            "pictures have a mean grey value of {now:.0f}, {usual:.0f} is usual",
            "±",
        ),
        ("focus", reference.focus, "pictures have {share:.0%} of the usual sharpness", "-"),
        ("coverage", reference.coverage, "{now:.0%} of the pixels have a point, {usual:.0%} are usual", "-"),
        ("score", scores, "scores are {now:.4g}, {usual:.4g} is usual, and nothing else explains it", "±"),
    ):
        values = [value for each in window if (value := getattr(each, name)) is not None]
        if band is None or not values:
            continue
        now = float(np.median(values))
        off = band.usual - now if ways == "-" else abs(now - band.usual)
        told = words.format(now=now, usual=band.usual, share=now / band.usual if band.usual else 0.0)
        found[name] = Departure(max(off, 0.0) / band.bound if band.bound else float(off > 0) * 2, told)  # type: ignore[index]
    if reference.rig is not None and (plane := _plane(reference.rig, window)):
        found["plane"] = plane
    blurred = (
        found["focus"].share > 1 if "focus" in found else False
    )  # where the edges are is not certain then
    if reference.registration is not None and not blurred:
        shift = _shift(reference.registration, window)
        found |= {"registration": shift} if shift else {}
    return found


def _plane(rig: Rig, window: Sequence[Look]) -> Departure | None:
    seen = [each.support for each in window if each.coverage is not None]
    planes = [support for support in seen if support is not None]
    if not seen:
        return None
    if 2 * len(planes) < len(seen):
        return Departure(2.0, "the support is no longer seen at the border of the clouds")
    offset = float(np.median([plane_offset_m(plane, rig.plane, middle) for plane, middle in planes]))
    tilt = float(np.median([plane_tilt_deg(plane, rig.plane) for plane, _ in planes]))
    told = f"the support lies {offset * 1e3:.1f} mm off and is turned by {tilt:.2f} degrees"
    return Departure(max(offset / rig.offset_limit_m, tilt / rig.tilt_limit_deg), told)


def _shift(usual: Registration, window: Sequence[Look]) -> Departure | None:
    total = _agreement(window)
    if total is None or total.max() < LEAST:
        return None
    reach = len(total) // 2
    down, right = best_shift(total)
    row, column = usual.down + reach, usual.right + reach
    here = float(total[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].max())
    share = max(abs(down - usual.down), abs(right - usual.right)) / (TOLERATED + 0.5)
    if float(total.max()) <= SURE * here:
        share = min(share, 0.99)
    told = (
        f"clouds agree with their images when they are moved {right - usual.right:+d} px across and "
        f"{down - usual.down:+d} px down on the 224 grid"
    )
    return Departure(share, told)


def _agreement(looks: Sequence[Look]) -> npt.NDArray[np.float64] | None:
    """The mean agreement of several frames."""
    found = [each.agreement for each in looks if each.agreement is not None]
    return np.mean(found, axis=0, dtype=np.float64) if found else None
