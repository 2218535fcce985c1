"""From a frame to the tensors of the contract.

The one implementation: training, calibration, parity, server and client all call `prepare`. It follows the
loader of CFM (square pad, bicubic RGB, nearest xyz): github.com/CVLAB-Unibo/crossmodal-feature-mapping at 63288af, with
BTF's histograms of the points where a method takes them (see `fpfh`); or, where the networks see an image of the cloud,
that of CRD and TRD (see `depth_image`) or of AST (see `relief`).
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from m3ad.camera import Camera
from m3ad.contract import GRID_SIZE, IMAGE_SIZE, MIN_POINTS, PADDED, RGB_SIZE, Geometry
from m3ad.depth_image import NORMAL_SIZES, bilinear, closed, corner_plane, depth_image, nearest, normal_image
from m3ad.errors import ArtifactError, FrameError
from m3ad.fpfh import fpfh_cells
from m3ad.frames import Frame
from m3ad.grid import EIGHT, grid_source, squared
from m3ad.holes import ZeroRule, holes_as_zeros, measured, require_declared_holes
from m3ad.plane import Plane, border_points, distance_m, fit_plane
from m3ad.regions import Regions, with_regions
from m3ad.relief import corner_surface, filled, relief
from m3ad.scale import extent, unit_mistake
from m3ad.scored import Lattice, checked_lattice, on_lattice, scored_pixels
from m3ad.typed_json import typed

PlaneRemoval = Literal["none", "fixed", "ransac", "corners"]
Modality = Literal["rgb", "xyz"]

IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)
# [256, 3]: the normalised value of every grey level of every channel.
NORMALISED = (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD
FARTHEST_M = 100.0  # no inspection sensor sees farther; a larger median distance means millimetres
# Settings of bundles that were written before these had a name.
BEFORE = {
    "without": None,
    "hole": None,
    "zero_rule": "any_coordinate",
    "extent_m": None,
    "camera": None,
    "regions": None,
    "lattice": "all",
    "geometry": "points",
    "normal_size": 5,
}


class ModelInput(NamedTuple):
    """The pipeline's inputs by their contract names.

    Args:
        image: [1, 3, 224, 224] float32, ImageNet-normalised; [1, 3, 256, 256] with a `depth_image`, all grids likewise;
            [1, 3, 768, 768] with a `relief`, the grids of 192 x 192.
        points: [N, 3] float32, metres, the foreground in row-major order, not centred.
        point_pixel: [N] int32, ascending, row-major pixel of each point on the 224 x 224 grid.
        scored_pixel: [R] int32, ascending, row-major pixel of each row that is scored (`scored`).
        depth_image: [1, 3, 256, 256] float32, ImageNet-normalised depth or normals, for methods that see the cloud so.
        relief: [1, 1, 192, 192] float32, centimetres about the part's mean, 0 off the part, likewise (`relief`).
        relief_mask: [1, 1, 24, 24] float32, how much of the part lies in each 8 x 8 cell of `relief`.
        fpfh: [784, 33] float32, histograms of the points' surroundings, means over 28 x 28 cells, likewise (`fpfh`).
    """

    image: npt.NDArray[np.float32]
    points: npt.NDArray[np.float32]
    point_pixel: npt.NDArray[np.int32]
    scored_pixel: npt.NDArray[np.int32]
    depth_image: npt.NDArray[np.float32] | None = None
    relief: npt.NDArray[np.float32] | None = None
    relief_mask: npt.NDArray[np.float32] | None = None
    fpfh: npt.NDArray[np.float32] | None = None

    @property
    def cloud(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """What stands for the cloud: points and their pixels, or what the networks see in place of points."""
        if self.fpfh is not None:
            return self.fpfh, self.point_pixel
        if self.relief is not None and self.relief_mask is not None:
            return self.relief, self.relief_mask
        return self.points if self.depth_image is None else self.depth_image, self.point_pixel


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """The choices a bundle fixes; the same choices and the same frame give the same tensors bit for bit.

    Args:
        plane: `none`; `fixed` removes `plane_coefficients`; `ransac` fits each frame's border; `corners` takes three
            corners of an image of the cloud (CRD).
        plane_coefficients: (a, b, c, d) of ax + by + cz + d = 0 in metres, for `fixed` only.
        plane_distance_m: points nearer to the plane are removed (CFM: 5 mm).
        largest_component: after a plane's removal keep only the largest connected piece (CFM's DBSCAN step,
            done on the grid: gaps of up to two pixels are bridged).
        seed: of the RANSAC sampling.
        without: a modality that this line's frames do not have; it is masked out of every frame (`without_modality`).
        hole: a number that stands for `not measured`: a point with a coordinate of this value is a hole.
        zero_rule: `point` makes (0, 0, 0) a hole; `any_coordinate` every point with a zero coordinate (CFM).
        extent_m: how large the training frames' foreground is (`scale.extent`, median); another unit is told by it.
        camera: of depth images that have no camera's file beside them.
        regions: the pixels of a frame that count; None is all of them.
        lattice: which of the pixels that the foreground reaches are scored: `all`, `half` or every k-th in both axes.
        geometry: what the networks see of the cloud; the method's.
        normal_size: of the Sobel operator behind `normals`, 3, 5 or 7 pixels; the larger, the steeper they look (TRD).

    Raises:
        ValueError: a value is out of range, or the coefficients do not go with `plane`.
    """

    plane: PlaneRemoval = "none"
    plane_coefficients: Plane | None = None
    plane_distance_m: float = 0.005
    largest_component: bool = True
    seed: int = 0
    without: Modality | None = None
    hole: float | None = None
    zero_rule: ZeroRule = "point"
    extent_m: float | None = None
    camera: Camera | None = None
    regions: Regions | None = None
    lattice: Lattice = "all"
    geometry: Geometry = "points"
    normal_size: int = 5

    def __post_init__(self) -> None:
        if self.plane not in get_args(PlaneRemoval):
            raise ValueError(f"plane must be one of {', '.join(get_args(PlaneRemoval))}, got {self.plane!r}")
        if (self.plane == "fixed") != (self.plane_coefficients is not None):
            raise ValueError(
                f"plane {self.plane!r} with plane_coefficients {self.plane_coefficients}: "
                "only `fixed` takes them, and needs them"
            )
        c = self.plane_coefficients
        if c is not None and not (len(c) == 4 and all(map(math.isfinite, c)) and any(c[:3])):
            raise ValueError(
                f"plane_coefficients must be four finite numbers with a normal that is not zero, got {c}"
            )
        if not 0 < self.plane_distance_m < math.inf:
            raise ValueError(f"plane_distance_m must be positive, got {self.plane_distance_m}")
        if self.without not in (None, *get_args(Modality)):
            raise ValueError(f"without must be rgb or xyz, got {self.without!r}")
        if self.without == "xyz" and self.plane != "none":
            raise ValueError(
                f"without xyz and plane {self.plane!r}: a cloud that is masked flat has no plane to remove"
            )
        if self.hole is not None and not math.isfinite(self.hole):
            raise ValueError(
                f"hole must be a finite number, got {self.hole}; NaN and infinite are holes anyway"
            )
        if self.zero_rule not in get_args(ZeroRule):
            raise ValueError(
                f"zero_rule must be one of {', '.join(get_args(ZeroRule))}, got {self.zero_rule!r}"
            )
        if self.extent_m is not None and not 0 < self.extent_m < math.inf:
            raise ValueError(f"extent_m must be positive, got {self.extent_m}")
        checked_lattice(self.lattice)
        if self.geometry not in get_args(Geometry):
            raise ValueError(
                f"geometry must be one of {', '.join(get_args(Geometry))}, got {self.geometry!r}"
            )
        if self.geometry in PADDED and self.plane == "corners":
            raise ValueError("plane corners is for methods that see the cloud as an image; use ransac")
        if self.normal_size not in NORMAL_SIZES:
            raise ValueError(f"normal_size must be 3, 5 or 7, got {self.normal_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def to_json(self) -> dict[str, Any]:
        """The choices as they stand in a bundle's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """Read the choices back from a manifest.

        Raises:
            ArtifactError: a key is missing or unknown, or a value is out of range.
        """
        values = {**BEFORE, **values}
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            odd = ", ".join(sorted(values.keys() ^ expected))
            raise ArtifactError(
                f"preprocessing settings do not fit this version of m3ad (missing or unknown: {odd}); "
                "export the bundle again"
            )
        return typed(values, cls, "the record of preprocessing settings", "Export the bundle again")


def prepare(frame: Frame, preprocessing: Preprocessing) -> ModelInput:
    """Turn a frame into the pipeline's inputs.

    RGB: edge-replicated to a square, bicubic (antialiased) to 224, ImageNet-normalised. Cloud: zero-padded to
    the same square, nearest sampling floor(i * side / 224). Foreground: the measured points, minus the plane.
    With an image of the cloud: everything stretched, RGB bilinear (antialiased); see `depth_image` and `relief`.

    Raises:
        FrameError: the frame is of another size than the regions; or the cloud has fewer than 1024 foreground points,
            is not in metres or not in the unit of the training frames, has holes with a number that is not declared, or
            shows no plane.
    """
    if preprocessing.regions:
        frame = with_regions(frame, preprocessing.regions)
    if preprocessing.without:
        frame = without_modality(with_holes(frame, preprocessing), preprocessing.without)
    if preprocessing.geometry not in PADDED:
        return _prepare_images(frame, preprocessing)
    height, width = frame.xyz.shape[:2]
    rows, cols = grid_source(height, width)
    # Sampling first is the same as padding first: removal of a plane looks at each point alone.
    inside = np.ix_((rows >= 0) & (rows < height), (cols >= 0) & (cols < width))
    xyz = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    xyz[inside] = frame.xyz[np.ix_(rows[inside[0].ravel()], cols[inside[1].ravel()])]
    xyz = _with_zeros(xyz, preprocessing)
    foreground = _seen(frame, xyz, preprocessing)
    seen = np.count_nonzero(foreground)
    if preprocessing.plane != "none":
        foreground &= _off_plane(frame, xyz, preprocessing)
        if preprocessing.largest_component:
            foreground = _largest_component(foreground)
    count = np.count_nonzero(foreground)
    if count < MIN_POINTS:
        removed = (
            f" after plane removal `{preprocessing.plane}` took {seen - count}"
            if preprocessing.plane != "none"
            else ""
        )
        raise FrameError(
            f"frame {frame.name} has {count} foreground points on the {IMAGE_SIZE} x {IMAGE_SIZE} grid"
            f"{removed}, expected at least {MIN_POINTS}; the part must fill more of the frame"
        )
    point_pixel = np.flatnonzero(foreground).astype(np.int32)
    points = xyz.reshape(-1, 3)[point_pixel]
    _require_unit(frame.name, points, preprocessing.extent_m)
    scored = on_lattice(scored_pixels(point_pixel), preprocessing.lattice)
    if not len(scored):
        raise FrameError(
            f"frame {frame.name}: no pixel of the part lies on the lattice {preprocessing.lattice}; the part is "
            "too thin for it, use a finer one"
        )
    histograms = fpfh_cells(points, point_pixel) if preprocessing.geometry == "fpfh" else None
    return ModelInput(_image(frame.rgb), points, point_pixel, scored, fpfh=histograms)


def _seen(frame: Frame, xyz: npt.NDArray[np.float32], preprocessing: Preprocessing) -> npt.NDArray[np.bool_]:
    """Where a cloud on the grid was measured; a cloud that cannot be metres is refused."""
    foreground = measured(xyz)
    if not foreground.any():
        raise FrameError(_why_empty(frame))
    require_declared_holes(frame.name, xyz[foreground], preprocessing.hole)
    distance = np.median(np.abs(xyz[foreground]).max(axis=1))
    if distance > FARTHEST_M:
        raise FrameError(
            f"frame {frame.name}: half of the cloud is farther than {distance:.0f} m; "
            "xyz must be in metres, so divide millimetres by 1000"
        )
    return foreground


def _prepare_images(frame: Frame, preprocessing: Preprocessing) -> ModelInput:
    """RGB and an image of the cloud, both stretched; the foreground is what lies off the plane."""
    size = GRID_SIZE[preprocessing.geometry]
    cloud = _with_zeros(frame.xyz, preprocessing)
    seen = _seen(frame, nearest(cloud, size), preprocessing)
    cloud = np.where(measured(cloud)[..., None], cloud, np.float32(0))
    xyz = nearest(cloud, size)
    if preprocessing.geometry == "relief":
        z = filled(cloud[..., 2])
        mask = _relief_mask(frame, cloud, z, preprocessing)
        foreground = seen & nearest(mask, size)
    else:
        foreground = seen & _image_mask(frame, xyz, preprocessing)
    if not foreground.any():
        raise FrameError(
            f"frame {frame.name}: plane removal `{preprocessing.plane}` left none of {np.count_nonzero(seen)} points; "
            "check that the part stands out of its support by more than "
            f"{preprocessing.plane_distance_m * 1000:g} mm, or use plane removal `none`"
        )
    pixel = np.flatnonzero(foreground).astype(np.int32)
    points = xyz.reshape(-1, 3)[pixel]
    _require_unit(frame.name, points, preprocessing.extent_m)
    side = RGB_SIZE[preprocessing.geometry]
    levels = np.asarray(Image.fromarray(frame.rgb).resize((side, side), Image.Resampling.BILINEAR))
    image = np.stack([NORMALISED[levels[:, :, c], c] for c in range(3)])[None]
    every = np.arange(size * size, dtype=np.int32)
    if preprocessing.geometry == "relief":
        depth, weights = relief(z, mask)
        return ModelInput(image, points, pixel, every, None, depth[None, None], weights[None, None])
    if preprocessing.geometry == "depth":
        grey = depth_image(xyz[..., 2], _image_mask(frame, xyz, preprocessing))
        shape = np.repeat(grey[..., None], 3, axis=2)
    else:
        mask = _image_mask(frame, cloud, preprocessing)
        shape = bilinear(normal_image(cloud[..., 2], mask, preprocessing.normal_size), size)
    normalised = ((shape - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)[None]
    return ModelInput(image, points, pixel, every, np.ascontiguousarray(normalised, np.float32))


def _relief_mask(
    frame: Frame, xyz: npt.NDArray[np.float32], z: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    """Where a relief of the depth z [H, W], its holes filled, shows the part: off the background."""
    has_depth: npt.NDArray[np.bool_] = z != 0
    if preprocessing.plane != "corners":
        return _image_mask(frame, xyz, preprocessing) & has_depth
    try:
        background = corner_surface(z)
    except FrameError as error:
        raise FrameError(f"frame {frame.name}: {error}") from error
    off: npt.NDArray[np.bool_] = np.abs(z - background) > preprocessing.plane_distance_m
    return off & has_depth


def _image_mask(
    frame: Frame, xyz: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    """Where an image of the cloud [H, W, 3] shows it: off the plane, small gaps closed; everywhere without removal."""
    if preprocessing.plane == "none":
        return np.ones(xyz.shape[:2], np.bool_)
    if preprocessing.plane == "corners":
        try:
            plane = corner_plane(xyz)
        except FrameError as error:
            raise FrameError(f"frame {frame.name}: {error}") from error
        return closed(measured(xyz) & (distance_m(xyz, plane) > preprocessing.plane_distance_m))
    mask = measured(xyz) & _off_plane(frame, xyz, preprocessing)
    return closed(_largest_component(mask) if preprocessing.largest_component else mask)


def with_holes(frame: Frame, preprocessing: Preprocessing) -> Frame:
    """The frame with its declared holes as (0, 0, 0), so that `holes.measured` tells all of them.

    Raises:
        FrameError: holes carry a number that is not declared.
    """
    xyz = _with_zeros(frame.xyz, preprocessing)
    require_declared_holes(frame.name, xyz[measured(xyz)], preprocessing.hole)
    return frame if xyz is frame.xyz else Frame(frame.rgb, xyz, frame.name)


def geometry(xyz: npt.NDArray[np.float32], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """The cloud [H, W, 3] to measure on: declared holes as (0, 0, 0), and nothing but holes where XYZ is masked out."""
    return np.zeros_like(xyz) if preprocessing.without == "xyz" else _with_zeros(xyz, preprocessing)


def without_modality(frame: Frame, modality: Modality) -> Frame:
    """The frame with one modality masked out: RGB its mean colour everywhere, XYZ the plane that fits its points best.

    z = a x + b y + c over all measured points, in metres; holes stay holes.
    """
    if modality == "rgb":
        mean = frame.rgb.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
        return Frame(np.broadcast_to(mean, frame.rgb.shape).copy(), frame.xyz, frame.name)
    seen = measured(frame.xyz)
    if not seen.any():
        return frame
    x, y, z = frame.xyz[seen].astype(np.float64).T
    sides = np.stack([x, y, np.ones_like(x)], axis=1)
    flat = frame.xyz.copy()
    flat[seen, 2] = sides @ np.linalg.lstsq(sides, z, rcond=None)[0]
    return Frame(frame.rgb, flat, frame.name)


def _with_zeros(xyz: npt.NDArray[np.float32], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    return holes_as_zeros(xyz, preprocessing.hole, preprocessing.zero_rule)


def _require_unit(name: str, points: npt.NDArray[np.float32], extent_m: float | None) -> None:
    if extent_m is not None and (mistake := unit_mistake(extent(points), extent_m)):
        raise FrameError(f"frame {name}: its part {mistake}")
    largest = np.abs(points).max(axis=1)
    if (far := np.count_nonzero(largest > FARTHEST_M)) > 0:
        raise FrameError(
            f"frame {name}: {far} of {len(points)} foreground points lie farther than {FARTHEST_M:g} m (up to "
            f"{largest.max():.6g}); xyz must be in metres, and a number that stands for holes must be declared with "
            "--hole VALUE in m3ad-export train"
        )


def _image(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    resized = Image.fromarray(squared(rgb)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    levels = np.asarray(resized)
    return np.stack([NORMALISED[levels[:, :, c], c] for c in range(3)])[None]


def _off_plane(
    frame: Frame, xyz: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    plane = preprocessing.plane_coefficients
    if plane is None:
        try:
            plane = fit_plane(border_points(_with_zeros(frame.xyz, preprocessing)), preprocessing.seed)
        except FrameError as error:
            raise FrameError(f"frame {frame.name}: {error}") from error
    return distance_m(xyz, plane) >= preprocessing.plane_distance_m


def _largest_component(foreground: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    labels, _ = ndimage.label(ndimage.binary_dilation(foreground, EIGHT), EIGHT)
    labels[~foreground] = 0
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else foreground


def _why_empty(frame: Frame) -> str:
    if not np.isfinite(frame.xyz).any():
        return (
            f"frame {frame.name}: every xyz value is NaN or infinite, expected metres; "
            "check the sensor and its export"
        )
    return (
        f"frame {frame.name} is all background: every point is a hole, (0, 0, 0) or as declared; "
        "check that the part is in view and that xyz holds metres"
    )
