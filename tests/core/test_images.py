"""Pictures that are stored turned or deeper than 8 bits are read as they were taken, or refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from m3ad.errors import FrameError
from m3ad.frames import read_frame
from PIL import Image, ImageOps

HEIGHT, WIDTH = 24, 40
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of PNG's colour types


def picture() -> np.ndarray:
    """Smooth, so that JPEG keeps it, and different under every turn and mirror."""
    v, u = np.indices((HEIGHT, WIDTH))
    return np.stack([v * 8, u * 6, np.where(v * WIDTH < u * HEIGHT, 40, 200)], axis=-1).astype(np.uint8)


def png16(pixels: np.ndarray, colour: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read(
    folder: Path, content: bytes, name: str = "part.png", size: tuple[int, int] = (HEIGHT, WIDTH)
) -> np.ndarray:
    (folder / name).write_bytes(content)
    np.save(folder / "part.npy", np.ones((*size, 3), np.float32))
    return read_frame(folder / name, folder / "part.npy").rgb


def deep(bits: int, colour: int) -> np.ndarray:
    """The picture as a camera of so many bits puts it into 16: at the lower end."""
    rgb = picture().astype(np.int64)
    pixels = {1: rgb[..., :1], 2: rgb[..., [1, 2]], 3: rgb, 4: rgb[..., [0, 1, 2, 0]]}[CHANNELS[colour]]
    scaled = (pixels * ((1 << bits) - 1) + 127) // 255
    if colour in (4, 6):
        scaled[..., -1] = 65535  # opaque
    return scaled


@pytest.mark.parametrize("colour", [2, 6])
def test_colour_over_all_16_bits_is_the_8_bit_picture(tmp_path: Path, colour: int) -> None:
    np.testing.assert_array_equal(read(tmp_path, png16(deep(16, colour), colour)), picture())
    left = deep(12, colour) << 4  # 12 bits at the upper end, as some drivers put them
    assert np.abs(read(tmp_path, png16(left, colour)).astype(int) - picture()).max() <= 1


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
def test_fewer_bits_in_16_are_refused_in_colour_as_in_grey(tmp_path: Path, bits: int, colour: int) -> None:
    with pytest.raises(FrameError, match=r"part.png is uint16 \[24, 40.*expected an 8-bit RGB or grey image"):
        read(tmp_path, png16(deep(bits, colour), colour))


@pytest.mark.parametrize("tag", range(10))
@pytest.mark.parametrize("kind", ["jpg", "png", "png16"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    stored, file = Image.fromarray(picture()), io.BytesIO()
    if kind == "png16":
        eight = io.BytesIO()
        stored.save(eight, "PNG", exif=exif)
        at = eight.getvalue().find(b"eXIf") - 4
        (length,) = struct.unpack(">I", eight.getvalue()[at : at + 4])
        whole = png16(deep(16, 2), 2)
        file.write(whole[:33] + eight.getvalue()[at : at + 12 + length] + whole[33:])  # after IHDR
    else:
        stored.save(file, {"jpg": "JPEG", "png": "PNG"}[kind], quality=97, subsampling=0, exif=exif)
    reread = Image.open(io.BytesIO(file.getvalue())) if kind != "png16" else None
    if reread is None:
        reread = stored.copy()
        reread.getexif()[0x0112] = tag
    upright = np.array(ImageOps.exif_transpose(reread))
    name = "part.jpg" if kind == "jpg" else "part.png"
    np.testing.assert_array_equal(read(tmp_path, file.getvalue(), name, upright.shape[:2]), upright)
    assert (upright.shape[0] == WIDTH) is (tag in (5, 6, 7, 8))
    with pytest.raises(
        FrameError, match=f"the image is {upright.shape[1]}x{upright.shape[0]} pixels but the cloud"
    ):
        read(tmp_path, file.getvalue(), name, upright.shape[1::-1])


@pytest.mark.parametrize("kind", ["GIF", "EPS", "PPM"])
def test_the_content_decides_what_an_image_is(tmp_path: Path, kind: str) -> None:
    """A GIF that is called PNG is none, and PostScript is never run."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, kind)
    with pytest.raises(
        FrameError,
        match=r"part.png cannot be read as an image \(PNG, JPEG, BMP, WEBP or TIFF\) \(cannot identify",
    ):
        read(tmp_path, file.getvalue())
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    np.testing.assert_array_equal(read(tmp_path, file.getvalue(), "part.jpg"), picture())


MODES = {
    "BMP": "1 L P RGB RGBA",
    "TIFF": "1 L LA P PA RGB RGBA CMYK",
    "WEBP": "L RGB RGBA",
    "PNG": "1 L LA P RGB RGBA",
    "JPEG": "L RGB CMYK",
}


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k, modes in MODES.items() for m in modes.split()])
def test_pictures_of_every_format_become_the_rgb_that_their_writer_kept(
    tmp_path: Path, kind: str, mode: str
) -> None:
    file, options = io.BytesIO(), {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(picture()).convert(mode).save(file, kind, **options)
    name = f"part.{kind.lower()}"
    if (kind, mode) == ("TIFF", "CMYK"):
        with pytest.raises(
            FrameError, match="stores its colours as SEPARATED, expected RGB, grey or a palette"
        ):
            read(tmp_path, file.getvalue(), name)
    else:
        expected = np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        np.testing.assert_array_equal(read(tmp_path, file.getvalue(), name), expected)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (np.moveaxis(picture(), -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        (picture().astype(np.uint16) * 257, {"photometric": "rgb", "compression": "lzw", "predictor": 2}),
        (255 - picture()[..., 0], {"photometric": "miniswhite"}),
        (picture()[::-1, ::-1], {"photometric": "rgb", "extratags": [(274, 3, 1, 3, True)]}),
        (picture(), {"photometric": "rgb", "tile": (16, 16), "compression": "zlib"}),
    ],
)
def test_tiff_pictures_are_read_by_their_tags(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any]
) -> None:
    tifffile.imwrite(tmp_path / "written.tif", pixels, **options)
    found = read(tmp_path, (tmp_path / "written.tif").read_bytes(), "part.tif")
    grey = options["photometric"] == "miniswhite"
    np.testing.assert_array_equal(found, picture()[..., :1].repeat(3, axis=2) if grey else picture())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((HEIGHT, WIDTH, 3), np.float32), r"is float32 \[24, 40, 3\], expected an 8-bit RGB or grey"),
        (np.full((HEIGHT, WIDTH, 3), 4095, np.uint16), "no value above 4095, so how many of its bits count"),
        (np.zeros((HEIGHT, WIDTH, 7), np.uint8), r"holds uint8 \[24, 40, 7\], expected one image"),
    ],
)
def test_tiffs_that_are_no_pictures_are_refused(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    tifffile.imwrite(tmp_path / "written.tif", pixels, photometric="rgb" if pixels.shape[2] == 3 else None)
    with pytest.raises(FrameError, match=message):
        read(tmp_path, (tmp_path / "written.tif").read_bytes(), "part.tif")
