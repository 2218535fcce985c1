"""Image and array files to arrays: the one place that knows what a damaged file raises and how much memory it may take.

What a file claims in its header (format, type, size) is refused before anything is decoded.
"""

import reprlib
import struct
import tokenize
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from m3ad.errors import FrameError, one_line

MAX_PIXELS = 1 << 24  # 4096 x 4096; the networks see 224 x 224 of them
MAX_BYTES = (
    192 << 20
)  # of one decoded file: with the decoders' own copies reading a frame stays below 512 MiB
MAX_PAGES = 4096  # of a TIFF: some writers make a page of each row
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # by content; Pillow would hand others to their own programs
IMAGE_KINDS = f"{', '.join(IMAGE_FORMATS)} or TIFF"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF's lossless byte codecs. The others are images in the image, which may be larger than the TIFF says.
TIFF_CODECS = {
    1: "none",
    5: "LZW",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}
ORIENTATION = 0x0112  # EXIF's tag; which way its values are turned back
UPRIGHT: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}

PLAIN_MODES = ("1", "L", "RGB", "I", "I;16", "I;16B", "I;16L", "F")
DEPTH_TYPES = ("uint16", "int16", "int32", "uint32", "float16", "float32", "float64")
# How a TIFF stores its colours (tag 262).
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = range(4)

# What Pillow, tifffile, imagecodecs and NumPy raise on a damaged file (found by cutting files and flipping bytes).
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
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


class TiffTags(NamedTuple):
    """What a TIFF's first page says of its pixels: how colours are stored, a palette's [3, 256] uint16, its turn."""

    photometric: int
    colours: npt.NDArray[np.uint16] | None
    orientation: object


def open_image(path: Path) -> npt.NDArray[Any]:
    """Read a picture upright (EXIF), as it is stored except that palette, alpha and CMYK become RGB.

    Returns:
        [H, W] or [H, W, 3]; bool, uint8, or more for deep images.

    Raises:
        FrameError: the file is missing, damaged, of another format or larger than a frame may be.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            if file.read(4) in TIFF_MAGIC:
                return _tiff_picture(path)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            is_deep = _is_deep_colour(path)
            sample_bytes = 2 if is_deep or image.mode.startswith("I") else 1
            _require_size(path, image.height, image.width, len(image.getbands()) * sample_bytes)
            orientation = image.getexif().get(ORIENTATION, 1)
            is_plain = image.mode in PLAIN_MODES
            pixels = _deep_colour(path) if is_deep else np.array(image if is_plain else image.convert("RGB"))
            return _upright(pixels, orientation)
    except DAMAGED as error:
        raise damaged(path, f"an image ({IMAGE_KINDS})", error) from error


def open_tiff(path: Path) -> npt.NDArray[Any]:
    """Read the first image of a TIFF, its planes last where they lie one after the other, as planes or as pages.

    Returns:
        [H, W] or [H, W, C], of the type it is stored in.

    Raises:
        FrameError: the file is missing, damaged, or holds something else or more than a frame may.
    """
    return _tiff(path)[0]


def open_tiff_cloud(path: Path) -> npt.NDArray[Any]:
    """Read a cloud in a TIFF, [H, W, 3] float32 or float64, or a depth image [H, W] of integers or floats.

    Raises:
        FrameError: the file is missing, damaged, or holds something else or more than a frame may.
    """
    return _tiff(path, _require_cloud)[0]


def _tiff(
    path: Path, require: Callable[[Path, np.dtype[Any], tuple[int, ...]], None] | None = None
) -> tuple[npt.NDArray[Any], TiffTags]:
    """The first series of a TIFF and its tags; `require` refuses a type and shape before it is decoded."""
    require_file(path)
    try:
        _require_pages_that_end(path)
        with tifffile.TiffFile(path) as file:
            series, page = file.series[0], file.series[0].keyframe
            shape, dtype = series.shape, np.dtype(series.dtype)
            has_planes = len(shape) == 3 and shape[0] in (3, 4) and shape[2] not in (3, 4)
            if has_planes:
                shape = (*shape[1:], shape[0])
            (require or _require_image)(path, dtype, shape)
            if page.compression not in TIFF_CODECS:
                # A damaged tag may be text of any length.
                codec = getattr(page.compression, "name", None) or reprlib.repr(page.compression)
                raise FrameError(
                    f"{path} is compressed by {codec}, expected one of "
                    f"{', '.join(dict.fromkeys(TIFF_CODECS.values()))}; write it with one of these"
                )
            # Its description may give another shape than its pages, and tiles are decoded whole, however little of them
            # lies inside of the image.
            pages = float(page.size) * len(series.pages) * dtype.itemsize
            tiles = np.prod(page.chunks, dtype=float) * len(page.dataoffsets) * dtype.itemsize
            if pages > MAX_BYTES or (page.is_tiled and tiles > 2 * MAX_BYTES):
                raise ValueError(f"its pages are of {pages:.3g} bytes, its tiles or strips of {tiles:.3g}")
            array = np.asarray(series.asarray())
            array = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if has_planes else array
            orientation = page.tags.get(ORIENTATION)
            colours = page.colormap if page.photometric == PALETTE else None
            return array, TiffTags(page.photometric, colours, orientation.value if orientation else 1)
    except DAMAGED as error:
        raise damaged(path, "TIFF", error) from error


def _require_pages_that_end(path: Path) -> None:
    """Raise ValueError when a TIFF's pages name each other in a circle, which tifffile would follow for ever."""
    content: Any = np.memmap(path, np.uint8, "r")

    def number(kind: str, at: int) -> int:
        return int(struct.unpack_from(f"{order}{kind}", content, at)[0])

    order = "<" if bytes(content[:2]) == b"II" else ">"
    is_big = number("H", 2) == 43
    count, entry_bytes, offset = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    page, seen = number(offset, 8 if is_big else 4), set[int]()
    while page and page not in seen and len(seen) < MAX_PAGES:
        seen.add(page)
        tags = page + struct.calcsize(count)
        page = number(offset, tags + entry_bytes * number(count, page))
    if page:
        raise ValueError(f"its pages name each other in a circle, or are more than {MAX_PAGES}")


def _tiff_picture(path: Path) -> npt.NDArray[Any]:
    """[H, W] or [H, W, 3] of a TIFF in grey, RGB or a palette, with or without alpha."""
    pixels, tags = _tiff(path)
    if tags.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE):
        raise FrameError(
            f"{path} stores its colours as {getattr(tags.photometric, 'name', tags.photometric)}, expected RGB, grey "
            "or a palette; export it as RGB"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]
    if tags.colours is not None:
        pixels = (np.asarray(tags.colours) >> 8).astype(np.uint8).T[pixels]
    elif tags.photometric == WHITE_IS_ZERO:
        pixels = ~pixels
    return _upright(pixels, tags.orientation)


def _upright(pixels: npt.NDArray[Any], orientation: object) -> npt.NDArray[Any]:
    turned = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return np.ascontiguousarray(turned(pixels) if turned else pixels)


def open_npy(path: Path) -> npt.NDArray[Any]:
    """Read a cloud in an NPY without pickles, [H, W, 3] float32 or float64, or a depth image [H, W].

    Raises:
        FrameError: the file is missing, damaged, or holds something else or more than a frame may.
    """
    require_file(path)
    try:
        # Mapped, because then NumPy compares the header with the file's length before it allocates.
        mapped = np.lib.format.open_memmap(path, mode="r")
        _require_cloud(path, mapped.dtype, mapped.shape)
        return np.array(mapped)
    except DAMAGED as error:
        raise damaged(path, "NPY", error) from error


def require_file(path: Path) -> None:
    """Raise FrameError when there is no such file."""
    if not path.is_file():
        raise FrameError(f"{path} does not exist or is not a file")


def damaged(path: Path, kind: str, error: BaseException | str) -> FrameError:
    """The sentence for a file that cannot be read."""
    reason = one_line(error) or type(error).__name__
    return FrameError(f"{path} cannot be read as {kind} ({reason}); it may be truncated, so copy it again")


def _require_cloud(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if len(shape) == 2 and dtype.newbyteorder("=") in DEPTH_TYPES:
        _require_size(path, shape[0], shape[1], 12)  # of the cloud that it becomes
        return
    if len(shape) != 3 or shape[2] != 3 or dtype.newbyteorder("=") not in ("float32", "float64"):
        raise FrameError(
            f"{path} holds {dtype} {list(shape)}, expected float32 or float64 [H, W, 3] in metres, or depth [H, W]"
        )
    _require_size(path, shape[0], shape[1], 3 * dtype.itemsize)


def _require_image(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] > 4):
        raise FrameError(f"{path} holds {dtype} {list(shape)}, expected one image [H, W] or [H, W, 3]")
    _require_size(path, shape[0], shape[1], dtype.itemsize * (shape[2] if len(shape) == 3 else 1))


def _require_size(path: Path, height: int, width: int, pixel_bytes: int) -> None:
    size = height * width * pixel_bytes
    if height * width > MAX_PIXELS or size > MAX_BYTES:
        raise FrameError(
            f"{path} claims {width}x{height} pixels, {size / 2**20:.0f} MiB; at most {MAX_PIXELS} pixels and "
            f"{MAX_BYTES >> 20} MiB are read, so export the frame at a lower resolution"
        )


def _is_deep_colour(path: Path) -> bool:
    """A PNG of 16 bits and more than one channel, of which Pillow would keep eight bits without a word."""
    with path.open("rb") as file:
        head = file.read(26)  # signature, then IHDR: length, name, width, height, bit depth, colour type
    return head.startswith(b"\x89PNG") and head[24:25] == b"\x10" and head[25:26] in (b"\2", b"\4", b"\6")


def _deep_colour(path: Path) -> npt.NDArray[np.uint16]:
    """[H, W, 3], or [H, W] of a grey image with alpha."""
    pixels = np.asarray(imagecodecs.png_decode(path.read_bytes()))
    return pixels[..., 0] if pixels.shape[-1] == 2 else pixels[..., :3]
