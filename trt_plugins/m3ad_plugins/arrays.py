"""The arrays that cross the ops' boundaries: their types, and the check of what a caller hands in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
# indptr, indices, weights; indptr may start above 0, at a range's first row.
Sparse = tuple[Int32, Int32, Float32]
# indptr, indices, weights and tokens: the sparse rows times the tokens; without the first three, rows as they are.
Features = tuple[Int32 | None, Int32 | None, Float32 | None, Float32]


def checked(
    name: str, array: Any, dtype: str, dims: tuple[int | str, ...], *, finite: bool = True
) -> NDArray[Any]:
    """`array` in C order, once it is what the op expects; a letter in `dims` stands for any size.

    Raises:
        ValueError: not an array of this dtype and shape, or a float that is not finite.
    """
    actual = array if isinstance(array, np.ndarray) else np.asarray(array)
    fits = actual.ndim == len(dims) and all(
        isinstance(want, str) or want == got for want, got in zip(dims, actual.shape, strict=True)
    )
    if not fits or actual.dtype != dtype:
        expected = ", ".join(str(dim) for dim in dims)
        raise ValueError(f"{name}: expected {dtype} [{expected}], got {actual.dtype} {list(actual.shape)}")
    if finite and dtype == "float32" and not np.isfinite(actual).all():
        bad = int(np.count_nonzero(~np.isfinite(actual)))
        raise ValueError(
            f"{name}: {bad} of {actual.size} values are NaN or infinite; remove the missing points first "
            "(m3ad.preprocess.prepare does)"
        )
    return np.ascontiguousarray(actual)


def checked_pixels(point_pixel: Int32, count: int, image_size: int) -> Int32:
    """`point_pixel`, once it names a pixel of the image for each of `count` points and none twice.

    Raises:
        ValueError: it does not.
    """
    pixel: Int32 = checked("point_pixel", point_pixel, "int32", (count,))
    if pixel.min() < 0 or pixel.max() >= image_size * image_size:
        raise ValueError(
            f"point_pixel: expected pixels 0..{image_size * image_size - 1} of a {image_size} x {image_size} "
            f"image, got {pixel.min()}..{pixel.max()}"
        )
    seen = np.bincount(pixel, minlength=image_size * image_size)
    if seen.max() > 1:
        raise ValueError(f"point_pixel: pixel {seen.argmax()} is named by {seen.max()} points, expected one")
    return pixel


def checked_points(
    points: Float32, point_pixel: Int32 | None, image_size: int
) -> tuple[Float32, Int32 | None]:
    """Points [N, 3], and their pixels where they are given.

    Raises:
        ValueError: one is not as described.
    """
    points = checked("points", points, "float32", ("N", 3))
    return points, None if point_pixel is None else checked_pixels(point_pixel, len(points), image_size)
