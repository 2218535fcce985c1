"""The regions of a rig's frames that are looked at: drawn once, kept in the bundle, applied before everything else."""

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct
from PIL import Image, ImageDraw

from m3ad.decode import MAX_PIXELS, open_image
from m3ad.errors import ArtifactError, FrameError
from m3ad.frames import Frame
from m3ad.typed_json import read_json, typed

Mask = npt.NDArray[np.bool_]
Side = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
Place = Annotated[float, Meta(ge=-1e5, le=1e5)]
Polygon = Annotated[list[tuple[Place, Place]], Meta(min_length=3)]
ADVICE = (
    "Write width and height of the frames, and include and ignore, lists of polygons [[x, y], ..] in pixels"
)


class Polygons(Struct, forbid_unknown_fields=True):
    """A drawing as JSON: polygons in pixels of a frame of this size."""

    width: Side
    height: Side
    include: list[Polygon] = []
    ignore: list[Polygon] = []


@dataclass(frozen=True, slots=True)
class Regions:
    """Which pixels of a frame count.

    Args:
        width, height: of the frames, pixels.
        kept: their mask row by row, a bit a pixel, zlib, base64.

    Raises:
        ValueError: `kept` is not the mask of such a frame, or keeps nothing.
    """

    width: Side
    height: Side
    kept: str

    def __post_init__(self) -> None:
        if self.width * self.height > MAX_PIXELS or not self.mask().any():
            raise ValueError(f"regions keep nothing of {self.width}x{self.height} pixels, or are too large")

    @classmethod
    def of(cls, mask: Mask) -> "Regions":
        """The regions of a mask [H, W], True where pixels count."""
        packed = zlib.compress(np.packbits(mask).tobytes(), 9)
        return cls(mask.shape[1], mask.shape[0], base64.b64encode(packed).decode())

    def mask(self) -> Mask:
        """[H, W], True where pixels count."""
        return _unpacked(self.width, self.height, self.kept)


def read_regions(include: Sequence[Path], ignore: Sequence[Path], polygons: Path | None) -> Regions:
    """The regions that masks (PNG and others, what is not black is meant) and a JSON of polygons draw together.

    A pixel counts where some drawing includes it, or none includes anything, and no drawing ignores it.

    Raises:
        FrameError: a picture cannot be read, the drawings are of different sizes, or nothing is left.
        ArtifactError: the JSON is none of polygons.
    """
    drawn = [(path, _mask_of(path), True) for path in include] + [
        (path, _mask_of(path), False) for path in ignore
    ]
    if polygons:
        found = typed(read_json(polygons, ADVICE), Polygons, str(polygons), ADVICE)
        if found.width * found.height > MAX_PIXELS:
            raise ArtifactError(
                f"{polygons} is for {found.width}x{found.height} pixels, too many for a frame. {ADVICE}"
            )
        drawn += [(polygons, _filled(found, p), True) for p in found.include]
        drawn += [(polygons, _filled(found, p), False) for p in found.ignore]
    if not drawn:
        raise FrameError("no region is drawn; give --include or --ignore masks, or --polygons with some")
    first, mask, _ = drawn[0]
    for path, other, _ in drawn:
        if other.shape != mask.shape:
            raise FrameError(
                f"{path} is {other.shape[1]}x{other.shape[0]} pixels but {first} {mask.shape[1]}x{mask.shape[0]}; draw "
                "regions on frames of one rig, all of one size"
            )
    nothing = np.zeros_like(mask)
    included = [m for _, m, is_included in drawn if is_included]
    ignored = [m for _, m, is_included in drawn if not is_included]
    kept = (np.logical_or.reduce(included) if included else ~nothing) & ~np.logical_or.reduce(
        [nothing, *ignored]
    )
    if not kept.any():
        raise FrameError(f"the regions of {first} leave no pixel to look at; include more, or ignore less")
    return Regions.of(kept)


def with_regions(frame: Frame, regions: Regions) -> Frame:
    """The frame with nothing but its regions: elsewhere XYZ is a hole, RGB the mean colour of what is kept.

    Raises:
        FrameError: the frame is of another size than the regions.
    """
    height, width = frame.rgb.shape[:2]
    if (width, height) != (regions.width, regions.height):
        raise FrameError(
            f"frame {frame.name} is {width}x{height} pixels but the bundle's regions are for {regions.width}x"
            f"{regions.height}; draw them again: m3ad-calibrate regions"
        )
    kept = regions.mask()
    rgb, xyz = frame.rgb.copy(), frame.xyz.copy()
    rgb[~kept] = frame.rgb[kept].mean(axis=0).round().astype(np.uint8)
    xyz[~kept] = 0
    return Frame(rgb, xyz, frame.name)


@lru_cache(maxsize=4)
def _unpacked(width: int, height: int, kept: str) -> Mask:
    count = width * height
    try:
        reader = zlib.decompressobj()
        packed = reader.decompress(base64.b64decode(kept, validate=True), -(-count // 8) + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f"regions' mask cannot be unpacked ({error})") from error
    if len(packed) != -(-count // 8) or not reader.eof:
        raise ValueError(f"regions' mask is not of {width}x{height} pixels")
    mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(np.bool_).reshape(height, width)
    mask.flags.writeable = False  # one for all frames
    return mask


def _mask_of(path: Path) -> Mask:
    return np.asarray(np.atleast_3d(open_image(path)).any(axis=2))


def _filled(found: Polygons, polygon: Sequence[tuple[float, float]]) -> Mask:
    canvas = Image.new("1", (found.width, found.height))
    ImageDraw.Draw(canvas).polygon(list(polygon), fill=1)
    return np.array(canvas)
