"""Eyecandies as published: a 16-bit depth image, its limits and its camera pose become an organized cloud.

Constants as in the conversion that M3DM and CFM publish, so that both give the same clouds.
"""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3ad.decode import open_image, require_file
from m3ad.errors import FrameError

RGB_ENDING = "_image_4.png"  # the lighting CFM and M3DM use
DEPTH_ENDING = "_depth.png"
FOCAL_PX = 711.11  # one camera took every image, of 512 x 512 pixels
MAX_PIXELS = 1 << 20


def xyz_from_depth(path: Path) -> npt.NDArray[np.float32]:
    """Back-project a depth image and zero the ground.

    x_world = pose^-1 ((u - W/2) d / f, (v - H/2) d / f, d, 1), then axes (x, z, y) times (0.1, -0.1, 0.1);
    background: less than 2 cm above the ground, beyond 1.8 along it, or |x| > 1 (M3DM's and CFM's constants).

    Args:
        path: NNN_depth.png, with NNN_info_depth.yaml and NNN_pose.txt beside it.

    Returns:
        [H, W, 3] metres, background exactly (0, 0, 0).

    Raises:
        FrameError: a file is missing, damaged, or does not hold what Eyecandies publishes.
    """
    limits_path, pose_path = info_path(path), path.with_name(f"{_stem(path)}_pose.txt")
    raw = open_image(path)
    if raw.ndim != 2 or raw.dtype not in ("uint16", "int32"):
        raise FrameError(f"{path} is {raw.dtype} {list(raw.shape)}, expected a 16-bit depth image [H, W]")
    if raw.size > MAX_PIXELS:
        raise FrameError(f"{path} has {raw.shape[1]}x{raw.shape[0]} pixels, Eyecandies publishes 512x512")
    require_file(limits_path)
    require_file(pose_path)
    limits = dict(re.findall(r"\b(min|max):\s*([-+.\deE]+)", limits_path.read_text(errors="replace")))
    try:
        near_m, far_m = float(limits["min"]), float(limits["max"])
        pose = np.loadtxt(pose_path).reshape(4, 4)
        camera_to_world = np.linalg.inv(pose)
    except (KeyError, ValueError, np.linalg.LinAlgError) as error:
        raise FrameError(
            f"{limits_path} or {pose_path.name} cannot be used ({error}); expected the files as Eyecandies "
            "publishes them: normalization min and max, and an invertible 4 x 4 pose"
        ) from error
    height, width = raw.shape
    depth_m = raw.astype(np.float64) / 65535.0 * (far_m - near_m) + near_m
    v, u = np.indices(raw.shape)
    camera = np.stack(
        [
            (u - width / 2) * depth_m / FOCAL_PX,
            (v - height / 2) * depth_m / FOCAL_PX,
            depth_m,
            np.ones_like(depth_m),
        ],
        axis=-1,
    )  # [H, W, 4]
    world = camera @ camera_to_world.T[:, :3]
    # The ground's slope, from the middle of the top row and of the bottom row.
    far, near = world[0, width // 2], world[-1, width // 2]
    sin, cos = (far - near)[1:] / np.hypot(*(far - near)[1:])
    y, z = world[..., 1] - near[1], world[..., 2] - near[2]
    above_ground, away = cos * y - sin * z, sin * y + cos * z
    background = (above_ground > -0.02) | (away > 1.8) | (np.abs(world[..., 0]) > 1)
    xyz = world[..., [0, 2, 1]] * (0.1, -0.1, 0.1)
    xyz[background] = 0
    return np.asarray(xyz, np.float32)


def info_path(path: Path) -> Path:
    """Where the limits of a depth image stand."""
    return path.with_name(f"{_stem(path)}_info_depth.yaml")


def _stem(path: Path) -> str:
    return path.name.removesuffix(DEPTH_ENDING)
