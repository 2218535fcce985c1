"""A depth camera: intrinsics as its tools save them, and a depth image to points.

The picture and the depth image are registered: one camera, one grid of pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3ad.errors import ArtifactError, FrameError
from m3ad.typed_json import read_json, typed

CAMERA_FILES = ("intrinsics.json", "intrinsic.json", "camera.json")
LEVELS = 4  # above a depth image in which its camera's file is looked for: depth, good, train, the category
MILLIMETRE = 0.001  # a unit of an integer depth image, unless the camera's file says otherwise
ROWS = 256  # of rays that are undistorted at once
MAX_STEPS = 500
TOLERANCE = 1e-9  # of a ray, in focal lengths
ADVICE = (
    "Write width, height, fx, fy, cx, cy in pixels, and where needed depth_scale (metres of a unit) and distortion "
    "(k1, k2, p1, p2, k3)"
)
# What RealSense's tools call the same.
OTHER_NAMES = {"ppx": "cx", "ppy": "cy", "coeffs": "distortion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole camera with Brown-Conrady distortion.

    Args:
        width, height: of its image, pixels.
        fx, fy: focal lengths, pixels.
        cx, cy: principal point, pixels; the middle of the first pixel is 0.
        depth_scale: metres of one unit of depth; None is 0.001 for integers and 1 for floats.
        distortion: k1, k2, p1, p2, then k3, then k4, k5, k6 of the rational form, as OpenCV orders them; or nothing.

    Raises:
        ValueError: a value is out of range.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    depth_scale: float | None = None
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy, self.depth_scale or 0, *self.distortion)
        if not all(map(math.isfinite, numbers)) or min(self.fx, self.fy, self.width, self.height) <= 0:
            raise ValueError("expected finite numbers, and sizes and focal lengths above 0")
        if self.depth_scale is not None and self.depth_scale <= 0:
            raise ValueError(f"depth_scale must be above 0, got {self.depth_scale}")
        if len(self.distortion) not in (0, 4, 5, 8):
            raise ValueError(
                f"distortion has {len(self.distortion)} coefficients, expected 4, 5 or 8, or none"
            )


def read_camera(path: Path) -> Camera:
    """Read a camera's JSON: fx, fy, cx, cy, or RealSense's ppx, ppy, coeffs, or Open3D's intrinsic_matrix.

    A `depth_scale` above 1 is units of a metre, as Open3D writes it, otherwise metres of a unit.

    Raises:
        ArtifactError: it cannot be read, a value is missing or out of range, or the distortion is of another model.
    """
    document = read_json(path, ADVICE)
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} holds no camera, expected a JSON object. {ADVICE}")
    if "inverse" in str(document.get("model", "")).lower() and any(document.get("coeffs") or ()):
        raise ArtifactError(
            f"{path} has the distortion of model {document['model']!r}, which maps the other way; rectify the depth "
            "image in the camera's driver, or give Brown-Conrady coefficients"
        )
    known: dict[str, Any] = {OTHER_NAMES.get(str(name), str(name)): value for name, value in document.items()}
    known |= _from_matrix(path, document) if "intrinsic_matrix" in document else {}
    values = {name: known[name] for name in Camera.__dataclass_fields__ if name in known}
    camera = typed(values, Camera, str(path), ADVICE)
    if camera.depth_scale is not None and camera.depth_scale > 1:
        camera = typed({**values, "depth_scale": 1 / camera.depth_scale}, Camera, str(path), ADVICE)
    return camera


def find_camera(depth_path: Path) -> Camera | None:
    """The camera whose file lies beside a depth image or in a folder above it; None where there is none.

    Raises:
        ArtifactError: the file cannot be used.
    """
    for folder in list(depth_path.absolute().parents)[:LEVELS]:
        for name in CAMERA_FILES:
            if (folder / name).is_file():
                return read_camera(folder / name)
    return None


def xyz_from_depth(depth: npt.NDArray[Any], camera: Camera) -> npt.NDArray[np.float32]:
    """Back-project a depth image: (x, y, 1) z, where z = depth times its scale and (x, y) distorts to the pixel.

    (u - cx) / fx = x R(r^2) + 2 p1 x y + p2 (r^2 + 2 x^2),  (v - cy) / fy = y R(r^2) + p1 (r^2 + 2 y^2) + 2 p2 x y,
    R(s) = (1 + k1 s + k2 s^2 + k3 s^3) / (1 + k4 s + k5 s^2 + k6 s^3)   (Brown 1966; OpenCV's order)

    Args:
        depth: [H, W] integers or floats, along the optical axis; 0 and what is not finite were not measured.
        camera: of the same size.

    Returns:
        [H, W, 3] float32, metres; (0, 0, 0) or not finite where nothing was measured.

    Raises:
        FrameError: the sizes differ, or the distortion cannot be undone at some pixel.
    """
    if depth.shape != (camera.height, camera.width):
        raise FrameError(
            f"the depth image is {depth.shape[1]}x{depth.shape[0]} pixels but its camera "
            f"{camera.width}x{camera.height}; give the intrinsics of the registered image"
        )
    scale = camera.depth_scale or (MILLIMETRE if depth.dtype.kind in "iu" else 1.0)
    xyz = np.empty((*depth.shape, 3), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite, which is a hole
        xyz[..., 2] = depth * scale
        x, y = _rays(camera)
        np.multiply(x, xyz[..., 2], out=xyz[..., 0])
        np.multiply(y, xyz[..., 2], out=xyz[..., 1])
    return xyz


@lru_cache(maxsize=2)
def _rays(camera: Camera) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """x and y of every pixel at z = 1, [1, W] and [H, 1], or both [H, W] where the lens distorts."""
    across = ((np.arange(camera.width) - camera.cx) / camera.fx)[None]
    down = ((np.arange(camera.height) - camera.cy) / camera.fy)[:, None]
    if not any(camera.distortion):
        return across.astype(np.float32), down.astype(np.float32)
    x, y = np.empty((2, camera.height, camera.width), np.float32)
    for top in range(0, camera.height, ROWS):
        rows = slice(top, top + ROWS)
        distorted_x, distorted_y = np.broadcast_arrays(across, down[rows])
        x[rows], y[rows] = _undistorted(distorted_x, distorted_y, camera)
    return x, y


def _undistorted(
    distorted_x: npt.NDArray[np.float64], distorted_y: npt.NDArray[np.float64], camera: Camera
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The rays that distort to these, by fixed-point iteration as OpenCV's `undistortPoints`."""
    k1, k2, p1, p2, k3, k4, k5, k6 = (*camera.distortion, *[0.0] * 8)[:8]
    x, y = distorted_x.copy(), distorted_y.copy()
    with np.errstate(all="ignore"):
        for _ in range(MAX_STEPS):
            s = x * x + y * y
            radial = (1 + s * (k1 + s * (k2 + s * k3))) / (1 + s * (k4 + s * (k5 + s * k6)))
            aside_x = 2 * p1 * x * y + p2 * (s + 2 * x * x)
            aside_y = p1 * (s + 2 * y * y) + 2 * p2 * x * y
            off = max(
                np.abs(x * radial + aside_x - distorted_x).max(),
                np.abs(y * radial + aside_y - distorted_y).max(),
            )
            if off < TOLERANCE:
                return x, y
            x, y = (distorted_x - aside_x) / radial, (distorted_y - aside_y) / radial
    raise FrameError(
        f"the camera's distortion {list(camera.distortion)} cannot be undone up to the image's corners; check its "
        "order (k1, k2, p1, p2, k3), or rectify the depth image in the camera's driver"
    )


def _from_matrix(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """fx, fy, cx, cy of a 3 x 3 matrix: nine numbers by columns, as Open3D writes them, or by rows."""
    matrix = typed(document["intrinsic_matrix"], list[float], f"{path}, its intrinsic_matrix", ADVICE)
    if len(matrix) == 9 and not any(matrix[2:6:3]) and any(matrix[6:8]):
        fx, _, _, skew, fy, _, cx, cy, one = matrix
    elif len(matrix) == 9:
        fx, skew, cx, _, fy, cy, _, _, one = matrix
    else:
        raise ArtifactError(f"{path}: its intrinsic_matrix has {len(matrix)} numbers, expected 9. {ADVICE}")
    if skew or one != 1:
        raise ArtifactError(
            f"{path}: its intrinsic_matrix {matrix} is none of a camera without skew. {ADVICE}"
        )
    return {"fx": fx, "fy": fy, "cx": cx, "cy": cy}
