"""Which pixels of a cloud are the part: measured, in metres, off the plane, in one piece."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.depth_image import closed, corner_plane
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.grid import EIGHT
from m3ad.holes import holes_as_zeros, measured, require_declared_holes
from m3ad.plane import border_points, distance_m, fit_plane
from m3ad.relief import corner_surface
from m3ad.scale import extent, unit_mistake

FARTHEST_M = 100.0  # no inspection sensor sees farther; a larger median distance means millimetres


def with_zeros(xyz: npt.NDArray[np.float32], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """The cloud [H, W, 3] with its declared holes as (0, 0, 0)."""
    return holes_as_zeros(xyz, preprocessing.hole, preprocessing.zero_rule)


def seen_pixels(
    frame: Frame, xyz: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    """Where a cloud [H, W, 3] was measured.

    Raises:
        FrameError: nowhere, holes carry a number that is not declared, or the cloud cannot be in metres.
    """
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


def standing(
    foreground: npt.NDArray[np.bool_],
    frame: Frame,
    xyz: npt.NDArray[np.float32],
    preprocessing: Preprocessing,
) -> npt.NDArray[np.bool_]:
    """What of the foreground stands off the plane, or the largest piece of it where the settings say so.

    Raises:
        FrameError: the frame's border shows no plane.
    """
    plane = preprocessing.plane_coefficients
    if plane is None:
        try:
            plane = fit_plane(border_points(with_zeros(frame.xyz, preprocessing)), preprocessing.seed)
        except FrameError as error:
            raise FrameError(f"frame {frame.name}: {error}") from error
    off = foreground & (distance_m(xyz, plane) >= preprocessing.plane_distance_m)
    return _largest_component(off) if preprocessing.largest_component else off


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


def relief_mask(
    frame: Frame, xyz: npt.NDArray[np.float32], z: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    """Where a relief of the depth z [H, W], its holes filled, shows the part: off the background.

    Raises:
        FrameError: the frame shows no background.
    """
    has_depth: npt.NDArray[np.bool_] = z != 0
    if preprocessing.plane != "corners":
        return image_mask(frame, xyz, preprocessing) & has_depth
    try:
        background = corner_surface(z)
    except FrameError as error:
        raise FrameError(f"frame {frame.name}: {error}") from error
    off: npt.NDArray[np.bool_] = np.abs(z - background) > preprocessing.plane_distance_m
    return off & has_depth


def image_mask(
    frame: Frame, xyz: npt.NDArray[np.float32], preprocessing: Preprocessing
) -> npt.NDArray[np.bool_]:
    """Where an image of the cloud [H, W, 3] shows it: off the plane, small gaps closed; everywhere without removal.

    Raises:
        FrameError: the frame shows no plane.
    """
    if preprocessing.plane == "none":
        return np.ones(xyz.shape[:2], np.bool_)
    if preprocessing.plane == "corners":
        try:
            plane = corner_plane(xyz)
        except FrameError as error:
            raise FrameError(f"frame {frame.name}: {error}") from error
        return closed(measured(xyz) & (distance_m(xyz, plane) > preprocessing.plane_distance_m))
    return closed(standing(measured(xyz), frame, xyz, preprocessing))


def require_unit(name: str, points: npt.NDArray[np.float32], extent_m: float | None) -> None:
    """Refuse points [N, 3] that are not in the unit of the training frames, or are no metres at all.

    Raises:
        FrameError: the part is of another size than `extent_m`, or points lie farther than a sensor sees.
    """
    if extent_m is not None and (mistake := unit_mistake(extent(points), extent_m)):
        raise FrameError(f"frame {name}: its part {mistake}")
    largest = np.abs(points).max(axis=1)
    if (far := np.count_nonzero(largest > FARTHEST_M)) > 0:
        raise FrameError(
            f"frame {name}: {far} of {len(points)} foreground points lie farther than {FARTHEST_M:g} m (up to "
            f"{largest.max():.6g}); xyz must be in metres, and a number that stands for holes must be declared with "
            "--hole VALUE in m3ad-export train"
        )
