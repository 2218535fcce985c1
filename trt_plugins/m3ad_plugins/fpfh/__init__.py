"""Fast point feature histograms of a cloud's points, which BTF's frames are prepared with: no ONNX op."""

import numpy as np
from m3ad.contract import IMAGE_SIZE
from m3ad.fpfh import NEIGHBORS, NORMAL_NEIGHBORS, NORMAL_RADIUS_M, RADIUS_M, WIDTH, FloatArray
from m3ad.fpfh import in_numpy as all_in_numpy

from m3ad_plugins import native
from m3ad_plugins.arrays import Float32, Int32, checked, checked_points


def fpfh(
    points: Float32,
    point_pixel: Int32 | None = None,
    normals: FloatArray | None = None,
    image_size: int = IMAGE_SIZE,
) -> tuple[FloatArray, FloatArray]:
    """Histograms of the angles between a point's normal and those of its neighbours.

    FPFH_i = SPFH_i + sum_k SPFH_k / d_ik^2, the sum scaled to 100 in each block of 11 bins   (Rusu et al. 2009, as in
    Open3D 0.19; `m3ad.fpfh` is the specification)

    Args:
        points: [N, 3] float32, metres, in the sensor's frame, finite.
        point_pixel: [N] int32, row-major pixel of each on the grid: it only makes the search faster.
        normals: [N, 3] float64, unit vectors; towards the sensor, of up to 30 neighbours within 0.1 m, if left out.
        image_size: side of the pixel grid.

    Returns:
        Histograms [N, 33] float64, each block of 11 sums to 200, to 0 for a point alone within 0.25 m, to 100 where all
        others lie in its place; and the normals [N, 3] float64.

    Raises:
        ValueError: an argument is not as described.
    """
    if not len(points):
        raise ValueError("points: expected at least 1, got 0")
    points, point_pixel = checked_points(points, point_pixel, image_size)
    if normals is not None:
        normals = checked("normals", normals, "float64", (len(points), 3))
        if bad := int(np.count_nonzero(~np.isfinite(normals))):
            raise ValueError(
                f"normals: {bad} of {normals.size} values are NaN or infinite; expected unit vectors"
            )
    return native.choose(in_cpp, in_numpy)(points, point_pixel, normals, image_size)


def in_cpp(
    points: Float32, point_pixel: Int32 | None, normals: FloatArray | None, image_size: int
) -> tuple[FloatArray, FloatArray]:
    """The portable C++; inputs are already checked."""
    count = len(points)
    taken = np.empty((count, 3)) if normals is None else normals
    histograms = np.empty((count, WIDTH))
    settings = (NORMAL_RADIUS_M, NORMAL_NEIGHBORS, RADIUS_M, NEIGHBORS, normals is not None)
    found = (taken, histograms, native.threads())
    native.call("fpfh", "ppiididiippi", points, point_pixel, count, image_size, *settings, *found)
    return histograms, taken


def in_numpy(
    points: Float32, point_pixel: Int32 | None, normals: FloatArray | None, image_size: int
) -> tuple[FloatArray, FloatArray]:
    """The specification, whose search needs no pixels."""
    return all_in_numpy(points, normals)
