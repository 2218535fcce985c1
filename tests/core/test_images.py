"""Pictures that are stored turned or deeper than 8 bits are read as they were taken, or refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS", "PPM", "WEBP"])
def test_the_content_decides_what_an_image_is(tmp_path: Path, kind: str) -> None:
    """A GIF that is called PNG is none, and PostScript is never run."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, kind)
    with pytest.raises(
        FrameError, match=r"part.png cannot be read as an image \(PNG or JPEG\) \(cannot identify"
    ):
        read(tmp_path, file.getvalue())
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    np.testing.assert_array_equal(read(tmp_path, file.getvalue(), "part.jpg"), picture())
