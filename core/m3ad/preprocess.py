"""From a frame to the tensors of the contract.

The one implementation: training, calibration, parity, server and client all call `prepare`. It follows the
loader of CFM (square pad, bicubic RGB, nearest xyz): github.com/CVLAB-Unibo/crossmodal-feature-mapping at 63288af, with
BTF's histograms of the points where a method takes them (see `fpfh`); or, where the networks see an image of the cloud,
that of CRD and TRD (see `depth_image`) or of AST (see `relief`).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from m3ad.contract import GRID_SIZE, IMAGE_SIZE, MIN_POINTS, PADDED, RGB_SIZE
from m3ad.depth_image import bilinear, depth_image, nearest, normal_image
from m3ad.errors import FrameError
from m3ad.foreground import (
    image_mask,
    relief_mask,
    require_unit,
    seen_pixels,
    standing,
    with_zeros,
)
from m3ad.fpfh import fpfh_cells
from m3ad.frame_settings import Modality, Preprocessing
from m3ad.frames import Frame
from m3ad.grid import grid_source, squared
from m3ad.holes import measured, require_declared_holes
from m3ad.regions import with_regions
from m3ad.relief import filled, relief
from m3ad.scored import on_lattice, scored_pixels

IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)
# [256, 3]: the normalised value of every grey level of every channel.
NORMALISED = (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD


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
    xyz = with_zeros(xyz, preprocessing)
    foreground = seen_pixels(frame, xyz, preprocessing)
    seen = np.count_nonzero(foreground)
    if preprocessing.plane != "none":
        foreground = standing(foreground, frame, xyz, preprocessing)
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
    require_unit(frame.name, points, preprocessing.extent_m)
    scored = on_lattice(scored_pixels(point_pixel), preprocessing.lattice)
    if not len(scored):
        raise FrameError(
            f"frame {frame.name}: no pixel of the part lies on the lattice {preprocessing.lattice}; the part is "
            "too thin for it, use a finer one"
        )
    histograms = fpfh_cells(points, point_pixel) if preprocessing.geometry == "fpfh" else None
    return ModelInput(_image(frame.rgb), points, point_pixel, scored, fpfh=histograms)


def _prepare_images(frame: Frame, preprocessing: Preprocessing) -> ModelInput:
    """RGB and an image of the cloud, both stretched; the foreground is what lies off the plane."""
    size = GRID_SIZE[preprocessing.geometry]
    cloud = with_zeros(frame.xyz, preprocessing)
    seen = seen_pixels(frame, nearest(cloud, size), preprocessing)
    cloud = np.where(measured(cloud)[..., None], cloud, np.float32(0))
    xyz = nearest(cloud, size)
    if preprocessing.geometry == "relief":
        z = filled(cloud[..., 2])
        mask = relief_mask(frame, cloud, z, preprocessing)
        foreground = seen & nearest(mask, size)
    else:
        foreground = seen & image_mask(frame, xyz, preprocessing)
    if not foreground.any():
        raise FrameError(
            f"frame {frame.name}: plane removal `{preprocessing.plane}` left none of {np.count_nonzero(seen)} points; "
            "check that the part stands out of its support by more than "
            f"{preprocessing.plane_distance_m * 1000:g} mm, or use plane removal `none`"
        )
    pixel = np.flatnonzero(foreground).astype(np.int32)
    points = xyz.reshape(-1, 3)[pixel]
    require_unit(frame.name, points, preprocessing.extent_m)
    side = RGB_SIZE[preprocessing.geometry]
    levels = np.asarray(Image.fromarray(frame.rgb).resize((side, side), Image.Resampling.BILINEAR))
    image = np.stack([NORMALISED[levels[:, :, c], c] for c in range(3)])[None]
    every = np.arange(size * size, dtype=np.int32)
    if preprocessing.geometry == "relief":
        depth, weights = relief(z, mask)
        return ModelInput(image, points, pixel, every, None, depth[None, None], weights[None, None])
    if preprocessing.geometry == "depth":
        grey = depth_image(xyz[..., 2], image_mask(frame, xyz, preprocessing))
        shape = np.repeat(grey[..., None], 3, axis=2)
    else:
        mask = image_mask(frame, cloud, preprocessing)
        shape = bilinear(normal_image(cloud[..., 2], mask, preprocessing.normal_size), size)
    normalised = ((shape - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)[None]
    return ModelInput(image, points, pixel, every, np.ascontiguousarray(normalised, np.float32))


def with_holes(frame: Frame, preprocessing: Preprocessing) -> Frame:
    """The frame with its declared holes as (0, 0, 0), so that `holes.measured` tells all of them.

    Raises:
        FrameError: holes carry a number that is not declared.
    """
    xyz = with_zeros(frame.xyz, preprocessing)
    require_declared_holes(frame.name, xyz[measured(xyz)], preprocessing.hole)
    return frame if xyz is frame.xyz else Frame(frame.rgb, xyz, frame.name)


def geometry(xyz: npt.NDArray[np.float32], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """The cloud [H, W, 3] to measure on: declared holes as (0, 0, 0), and nothing but holes where XYZ is masked out."""
    return np.zeros_like(xyz) if preprocessing.without == "xyz" else with_zeros(xyz, preprocessing)


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


def _image(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    resized = Image.fromarray(squared(rgb)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    levels = np.asarray(resized)
    return np.stack([NORMALISED[levels[:, :, c], c] for c in range(3)])[None]
