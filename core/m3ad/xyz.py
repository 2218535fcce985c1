"""The points of a frame, from a cloud of any kind or a depth image with its camera."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3ad import eyecandies
from m3ad.camera import CAMERA_FILES, Camera, find_camera, xyz_from_depth
from m3ad.clouds import read_cloud, read_cloud_header
from m3ad.decode import open_image, open_npy, open_tiff_cloud, require_file
from m3ad.errors import FrameError
from m3ad.eyecandies import DEPTH_ENDING, info_path

XYZ_SUFFIXES = (".tiff", ".tif", ".npy", ".ply", ".pcd")
DEPTH_SUFFIXES = (".png", ".tiff", ".tif", ".npy")


def read_xyz(path: Path, shape: tuple[int, int], camera: Camera | None = None) -> npt.NDArray[np.float32]:
    """Read the points of a frame from a file of any kind.

    Args:
        path: a cloud, or a depth image (PNG of 16 bits, TIFF, NPY) with its camera's file beside or above it.
        shape: (H, W) of its picture.
        camera: of a depth image that has no camera's file.

    Returns:
        [H, W, 3] float32, metres.

    Raises:
        FrameError: the file is missing, damaged, on another grid, or a depth image without a camera.
    """
    require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        found = find_camera(path)
        if path.name.endswith(DEPTH_ENDING) and (found is None or info_path(path).is_file()):
            return eyecandies.xyz_from_depth(path)
        return _projected(path, open_image(path), found or camera)
    if suffix in (".ply", ".pcd"):
        return _read_organized_cloud(path, shape)
    if suffix not in XYZ_SUFFIXES:
        raise FrameError(f"{path} is not a cloud that can be read; expected one of {', '.join(XYZ_SUFFIXES)}")
    xyz = open_npy(path) if suffix == ".npy" else open_tiff_cloud(path)
    return _metres(xyz) if xyz.ndim == 3 else _projected(path, xyz, find_camera(path) or camera)


def _projected(path: Path, depth: npt.NDArray[Any], camera: Camera | None) -> npt.NDArray[np.float32]:
    if depth.ndim != 2 or depth.dtype.kind not in "iuf" or depth.dtype.itemsize < 2:
        raise FrameError(
            f"{path} is {depth.dtype} {list(depth.shape)}, expected a depth image [H, W] of 16 bits or more"
        )
    if camera is None:
        raise FrameError(
            f"{path} is a depth image {list(depth.shape)} without its camera; put {CAMERA_FILES[0]} (width, height, "
            "fx, fy, cx, cy) beside it or above it, or train with --camera FILE"
        )
    try:
        return xyz_from_depth(depth, camera)
    except FrameError as error:
        raise FrameError(f"{path}: {error}") from error


def _read_organized_cloud(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    header = read_cloud_header(path)
    image = f"its image {shape[1]}x{shape[0]} pixels"
    if header.grid is not None and header.grid[0] == 1:
        raise FrameError(
            f"{path} says that it is unorganized ({header.grid[1]}x1 points) but {image}; "
            "expected an organized cloud: one point a pixel, row by row, holes kept as NaN or zeros"
        )
    if header.grid not in (None, shape):
        height, width = header.grid or shape
        raise FrameError(
            f"{path} is a grid of {width}x{height} points but {image}; "
            "they must be registered pixel by pixel, so export both at the same size, row by row"
        )
    if header.count != shape[0] * shape[1]:
        raise FrameError(
            f"{path} holds {header.count} points but its image {shape[0] * shape[1]} pixels; "
            "expected an organized cloud: one point a pixel, row by row, holes kept as NaN or zeros"
        )
    return _metres(read_cloud(path, header)).reshape(*shape, 3)


def _metres(xyz: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is a hole
        return xyz.astype(np.float32, copy=False)


def camera_of(path: Path) -> Camera | None:
    """The camera beside or above a depth image; None for a cloud, and for a depth image without a camera's file."""
    is_depth = path.suffix.lower() in DEPTH_SUFFIXES and path.parent.name != "xyz"
    return find_camera(path) if is_depth else None
