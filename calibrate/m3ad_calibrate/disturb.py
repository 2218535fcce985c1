"""What a line does to frames on its bad days, one disturbance at a time: light, optics, sensor, mounting.

Each changes a frame whose holes are (0, 0, 0) or not finite, and is the same for the same generator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from m3ad.frames import Frame
from m3ad.holes import measured
from PIL import Image
from scipy import ndimage

Change = Callable[[Frame, float, np.random.Generator], Frame]
BLOB_PX = 4.0  # standard deviation of the field whose peaks are the holes


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A kind of disturbance: what its level means, its levels from the weakest on, and what it does to a frame."""

    name: str
    unit: str
    levels: tuple[float, ...]
    change: Change


def _picture(frame: Frame, values: npt.NDArray[np.floating]) -> Frame:
    return Frame(np.clip(np.rint(values), 0, 255).astype(np.uint8), frame.xyz, frame.name)


def _cloud(frame: Frame, xyz: npt.NDArray[np.floating]) -> Frame:
    """Points that were measured where they are now; holes stay as they are."""
    moved = np.where(measured(frame.xyz)[..., None], xyz, frame.xyz).astype(np.float32)
    return Frame(frame.rgb, moved, frame.name)


def light(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """Every grey value times `level`, up to 255."""
    return _picture(frame, frame.rgb * level)


def colour_cast(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """Red `level` per cent brighter, blue as much darker: a lamp of another colour temperature."""
    return _picture(frame, frame.rgb * (1 + np.array([level, 0, -level]) / 100))


def blur(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """Gaussian blur of standard deviation `level`, in pixels of the frame."""
    return _picture(frame, ndimage.gaussian_filter(frame.rgb.astype(np.float64), (level, level, 0)))


def noise(frame: Frame, level: float, rng: np.random.Generator) -> Frame:
    """Gaussian noise of standard deviation `level`, in grey values of 255."""
    return _picture(frame, frame.rgb + rng.normal(0, level, frame.rgb.shape))


def jpeg(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """The image as JPEG of quality `level`."""
    packed = BytesIO()
    Image.fromarray(frame.rgb).save(packed, "JPEG", quality=int(level))
    return Frame(np.asarray(Image.open(packed)), frame.xyz, frame.name)


def missing_points(frame: Frame, level: float, rng: np.random.Generator) -> Frame:
    """`level` per cent of the measured points become holes, in blobs of some pixels, as on shiny or dark places."""
    field = ndimage.gaussian_filter(rng.normal(size=frame.xyz.shape[:2]), BLOB_PX)
    there = measured(frame.xyz)
    lost = there & (field > np.percentile(field[there], 100 - level)) if there.any() else there
    return Frame(frame.rgb, np.where(lost[..., None], np.float32(np.nan), frame.xyz), frame.name)


def depth_noise(frame: Frame, level: float, rng: np.random.Generator) -> Frame:
    """Gaussian noise of standard deviation `level` mm along z."""
    step = rng.normal(0, level / 1000, frame.xyz.shape[:2])
    return _cloud(frame, frame.xyz + step[..., None] * np.array([0, 0, 1]))


def tilt(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """The cloud turned by `level` degrees about the x axis through its centre; the image stays."""
    there = measured(frame.xyz)
    if not there.any():
        return frame
    centre, (sine, cosine) = frame.xyz[there].mean(axis=0), (f(np.radians(level)) for f in (np.sin, np.cos))
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return _cloud(frame, np.where(there[..., None], frame.xyz - centre, 0) @ turn.T + centre)


def misregistration(frame: Frame, level: float, _: np.random.Generator) -> Frame:
    """The image moved by `level` pixels along its rows against the cloud, interpolated, its rim repeated."""
    moved = ndimage.shift(frame.rgb.astype(np.float64), (0, level, 0), order=1, mode="nearest")
    return _picture(frame, moved)


DISTURBANCES = (
    Disturbance("less light", "times the light", (0.9, 0.75, 0.5), light),
    Disturbance("more light", "times the light", (1.1, 1.33, 2.0), light),
    Disturbance("colour cast", "% more red, less blue", (5, 10, 20), colour_cast),
    Disturbance("blur", "px", (0.5, 1, 2), blur),
    Disturbance("image noise", "grey values", (2, 5, 15), noise),
    Disturbance("jpeg", "(quality)", (90, 70, 40), jpeg),
    Disturbance("missing points", "% of the points", (5, 15, 40), missing_points),
    Disturbance("depth noise", "mm", (0.05, 0.2, 1), depth_noise),
    Disturbance("tilt", "degrees", (1, 3, 8), tilt),
    Disturbance("misregistration", "px", (0.5, 1.5, 4), misregistration),
)
