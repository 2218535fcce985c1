"""Image, array and cloud files to arrays: the one place that knows what a damaged file raises."""

import io
import struct
import tokenize
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from m3ad.errors import FrameError, MissingDependencyError

MAX_PIXELS = 1 << 26  # 8192 x 8192: a damaged header must not ask for more memory than a frame can need

# What Pillow, tifffile, imagecodecs and NumPy raise on a damaged file (found by cutting files and flipping bytes).
DAMAGED = (
    ArithmeticError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)


def open_image(path: Path) -> npt.NDArray[Any]:
    """Read an image as it is stored, except that palette, alpha and CMYK become RGB.

    Returns:
        [H, W] or [H, W, 3]; bool, uint8, or more for deep images.

    Raises:
        FrameError: the file is missing or damaged.
    """
    require_file(path)
    try:
        with Image.open(path) as image:
            _check_size(image.height * image.width)
            other = image.mode in ("P", "RGBA", "LA", "CMYK", "YCbCr")
            return np.array(image.convert("RGB") if other else image)
    except DAMAGED as error:
        raise _damaged(path, "an image", error) from error


def open_tiff(path: Path) -> npt.NDArray[Any]:
    """Read the first series of a TIFF; raises FrameError when the file is missing or damaged."""
    require_file(path)
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            _check_size(series.size // 3)
            return np.asarray(series.asarray())
    except DAMAGED as error:
        raise _damaged(path, "TIFF", error) from error


def open_npy(path: Path) -> npt.NDArray[Any]:
    """Read an NPY without pickles; raises FrameError when the file is missing or damaged."""
    require_file(path)
    try:
        # Mapped, because then NumPy compares the header with the file's length before it allocates.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except DAMAGED as error:
        raise _damaged(path, "NPY", error) from error


def open_cloud(path: Path) -> npt.NDArray[np.float64]:
    """Read the points of a PLY or PCD in file order, holes included.

    Returns:
        [M, 3].

    Raises:
        FrameError: the file is missing or damaged.
        MissingDependencyError: Open3D cannot be imported.
    """
    require_file(path)
    try:
        import open3d
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs Open3D, which cannot be imported ({error}); install it: pip install 'm3ad[view]', "
            "on a bare machine with its system libraries: apt-get install libusb-1.0-0 libgl1 libgomp1"
        ) from error
    # Of a damaged file Open3D returns uninitialised points and says so on stdout only.
    with redirect_stdout(io.StringIO()) as said:
        cloud = open3d.io.read_point_cloud(str(path), remove_nan_points=False, remove_infinite_points=False)
    if "failed" in said.getvalue():
        raise _damaged(path, path.suffix[1:].upper(), said.getvalue())
    return np.array(cloud.points)


def require_file(path: Path) -> None:
    """Raise FrameError when there is no such file."""
    if not path.is_file():
        raise FrameError(f"{path} does not exist or is not a file")


def _check_size(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"its header claims {num_pixels} pixels, more than {MAX_PIXELS}")


def _damaged(path: Path, kind: str, error: BaseException | str) -> FrameError:
    reason = " ".join(str(error).split())
    return FrameError(f"{path} cannot be read as {kind} ({reason}); it may be truncated, so copy it again")
