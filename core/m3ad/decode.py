"""Image files to arrays: the one place that knows what a damaged file raises."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from m3ad.errors import FrameError

# What Pillow, tifffile, imagecodecs and NumPy raise on a damaged file (found by cutting and flipping bytes).
DAMAGED = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    SyntaxError,
    struct.error,
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
            return np.array(
                image.convert("RGB") if image.mode in ("P", "RGBA", "LA", "CMYK", "YCbCr") else image
            )
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise FrameError(
            f"{path} cannot be read as an image ({error}); it may be truncated, so copy it again"
        ) from error


def require_file(path: Path) -> None:
    """Raise FrameError when there is no such file."""
    if not path.is_file():
        raise FrameError(f"{path} does not exist or is not a file")
