"""Small files that ask for much memory are refused by their header; one its library trips over stops nothing."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from m3ad.errors import FrameError
from m3ad.frames import find_pairs, read_frame, read_sample
from PIL import Image

SIDE = 8190
PEAK_MIB = 512
ONE_STRIP: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 4096}

READ = """
import sys
from pathlib import Path
from m3ad.errors import FrameError
from m3ad.frames import read_frame

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

before = peak_mib()
try:
    read_frame(Path(sys.argv[1]), Path(sys.argv[2]))
    said = "read"
except FrameError as error:
    said = str(error)
print(f"{peak_mib() - before:.0f} {said}")
"""


def zeros_png(width: int, height: int, depth: int, colour: int) -> bytes:
    row_bytes = width * depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour] // 8
    packer = zlib.compressobj(9)
    packed = b"".join([packer.compress(bytes(row_bytes + 1)) for _ in range(height)]) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    parts += [(b"PLTE", bytes(6))] if colour == 3 else []
    parts += [(b"IDAT", packed), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zeros_tiff(path: Path, dtype: str, compression: str = "zlib") -> None:
    encode = {"zlib": imagecodecs.zlib_encode, "lzw": imagecodecs.lzw_encode}[compression]
    whole, rest = (encode(np.zeros((n, SIDE, 3), dtype).tobytes()) for n in (64, SIDE % 64))
    strips = iter([whole] * (SIDE // 64) + [rest])
    shape = (SIDE, SIDE, 3)
    options = {"photometric": "rgb", "compression": compression, "rowsperstrip": 64}
    tifffile.imwrite(path, strips, shape=shape, dtype=dtype, **options)


def claim(path: Path, tags: tuple[int, ...], value: int) -> None:
    """Write another value into tags of a TIFF that are 16."""
    content = path.read_bytes()
    for tag in tags:
        for kind in (3, 4):
            old = struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", 16)
            content = content.replace(old, struct.pack("<HHI", tag, 4, 1) + struct.pack("<I", value))
    assert content != path.read_bytes()
    path.write_bytes(content)


def bmp_of(side: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def large_tiles(path: Path, dtype: str = "f4") -> None:
    """An image of 16 x 16 in one tile of 16,384 x 16,384."""
    tile = imagecodecs.zlib_encode(bytes(1 << 20))
    tifffile.imwrite(
        path,
        iter([tile]),
        shape=(16, 16, 3),
        dtype=dtype,
        photometric="rgb",
        tile=(16, 16),
        compression="zlib",
    )
    claim(path, (322, 323), 16384)  # TileWidth, TileLength


def picture_in_a_tile(path: Path, dtype: str) -> None:
    tile = zeros_png(30000, 30000, 1, 0)
    tifffile.imwrite(
        path,
        iter([tile]),
        shape=(16, 16, 3),
        dtype=dtype,
        photometric="rgb",
        tile=(16, 16),
        compression="png",
    )


def another_shape_in_the_description(path: Path) -> None:
    """tifffile's own description says 16 x 16, the tags 8192 x 8192."""
    strip = imagecodecs.zlib_encode(bytes(1 << 20))
    tifffile.imwrite(
        path, iter([strip]), shape=(16, 16, 3), dtype="f4", photometric="rgb", compression="zlib"
    )
    claim(path, (256, 257, 278), 8192)  # ImageWidth, ImageLength, RowsPerStrip


def sparse_npy(path: Path, dtype: str) -> None:
    shape = (30000, 30000, 3)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 30000 * 30000 * 3 * np.dtype(dtype).itemsize)


def sparse_pcd(path: Path, form: str) -> None:
    head = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 30000\nHEIGHT 30000\nPOINTS 900000000\nDATA {form}\n"
    with path.open("wb") as file:
        file.write(head.encode() + struct.pack("<II", 1 << 20, (900000000 * 12) & 0xFFFFFFFF))
        file.truncate(900000000 * 12 + 1000)


Writer = Callable[[Path], object]
CASES: dict[str, tuple[Writer, str]] = {
    "f8.tiff": (lambda p: zeros_tiff(p, "f8"), "claims 8190x8190 pixels, 1535 MiB; at most"),
    "lzw.tiff": (lambda p: zeros_tiff(p, "f4", "lzw"), "claims 8190x8190 pixels, 768 MiB"),
    "c16.tiff": (
        lambda p: zeros_tiff(p, "c16"),
        r"holds complex128 \[8190, 8190, 3\], expected float32 or float64",
    ),
    "u1-tile.tiff": (lambda p: picture_in_a_tile(p, "u1"), r"holds uint8 \[16, 16, 3\], expected"),
    "large-tile.tiff": (large_tiles, "cannot be read as TIFF .*its tiles or strips of 3.22e\\+09\\)"),
    "tags.tiff": (another_shape_in_the_description, r"tags.tiff (cannot be read as TIFF|claims 8192x8192)"),
    "f4.npy": (lambda p: sparse_npy(p, "<f4"), "claims 30000x30000 pixels, 10300 MiB"),
    "c16.npy": (lambda p: sparse_npy(p, "<c16"), "holds complex128"),
    "binary.pcd": (lambda p: sparse_pcd(p, "binary"), "is a grid of 30000x30000 points but its image 64x64"),
    "packed.pcd": (lambda p: sparse_pcd(p, "binary_compressed"), "is a grid of 30000x30000 points"),
    "bits.png": (lambda p: p.write_bytes(zeros_png(30000, 30000, 1, 0)), "cannot be read as an image"),
    "rgba16.png": (lambda p: p.write_bytes(zeros_png(SIDE, SIDE, 16, 6)), "claims 8190x8190 pixels, 512 MiB"),
    "deep.tif": (lambda p: zeros_tiff(p, "u2"), "claims 8190x8190 pixels, 384 MiB"),
    "large-tile.tif": (
        lambda p: large_tiles(p, "u1"),
        "cannot be read as TIFF .*its tiles or strips of 8.05e\\+08",
    ),
    "largest.bmp": (lambda p: p.write_bytes(bmp_of(30000)), "cannot be read as an image|claims 30000x30000"),
    "rgb8.png": (lambda p: p.write_bytes(zeros_png(SIDE, SIDE, 8, 2)), "claims 8190x8190 pixels"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    path, (write, message) = tmp_path / name, CASES[name]
    write(path)
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    np.save(tmp_path / "small.npy", np.ones((64, 64, 3), np.float32))
    is_picture = name.endswith(("png", "bmp", "tif"))
    pair = (path, tmp_path / "small.npy") if is_picture else (tmp_path / "small.png", path)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, pair)], capture_output=True, text=True, check=True
    )
    peak, said = done.stdout.split(" ", 1)
    with pytest.raises(FrameError, match=message):
        raise FrameError(said.strip())
    assert int(peak) < PEAK_MIB


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("largest.png", lambda p: p.write_bytes(zeros_png(4096, 4096, 8, 2))),
        ("palette.png", lambda p: p.write_bytes(zeros_png(4096, 4096, 8, 3))),
        ("rgba16.png", lambda p: p.write_bytes(zeros_png(4096, 4096, 16, 6))),
        ("f4.tiff", lambda p: tifffile.imwrite(p, np.ones((4096, 4096, 3), "f4"), **ONE_STRIP)),
        ("f8.npy", lambda p: np.save(p, np.ones((2896, 2896, 3)))),
        ("f8.tiff", lambda p: tifffile.imwrite(p, np.ones((2896, 2896, 3)), **ONE_STRIP)),
    ],
)  # fmt: skip
def test_the_largest_files_that_are_read_stay_below_the_bound(
    tmp_path: Path, name: str, write: Writer
) -> None:
    path = tmp_path / name
    write(path)
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    np.save(tmp_path / "small.npy", np.ones((64, 64, 3), np.float32))
    pair = (path, tmp_path / "small.npy") if name.endswith("png") else (tmp_path / "small.png", path)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, pair)], capture_output=True, text=True, check=True
    )
    peak, said = done.stdout.split(" ", 1)
    assert "pixels but the cloud" in said or "no value above 0" in said  # read; only its partner is smaller
    assert int(peak) < PEAK_MIB


def test_a_large_depth_image_is_not_projected(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "000_image_4.png")
    (tmp_path / "000_depth.png").write_bytes(zeros_png(4096, 4096, 16, 0))
    with pytest.raises(FrameError, match=r"000_depth.png has 4096x4096 pixels, Eyecandies publishes 512x512"):
        read_frame(tmp_path / "000_image_4.png", tmp_path / "000_depth.png")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_picture_in_a_tile_of_floats_is_not_decoded(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "tile.tiff"
    tile = zeros_png(64, 64, 8, 2)
    tifffile.imwrite(
        path, iter([tile]), shape=(16, 16, 3), dtype="u1", photometric="rgb", tile=(16, 16), compression="png"
    )
    content, bits = path.read_bytes(), {"f4": 32, "f8": 64}[dtype]
    content = content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", bits, bits, bits))
    planar, float_samples = struct.pack("<HHIHH", 284, 3, 1, 1, 0), struct.pack("<HHIHH", 339, 3, 1, 3, 0)
    assert planar in content
    path.write_bytes(content.replace(planar, float_samples))
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(
        FrameError, match=r"tile.tiff is compressed by PNG, expected one of none, LZW, deflate"
    ):
        read_frame(tmp_path / "small.png", path)


def test_a_codec_that_is_text_is_told_in_printable_words(tmp_path: Path) -> None:
    path = tmp_path / "text.tiff"
    tifffile.imwrite(path, np.ones((16, 16, 3), np.float32), photometric="rgb", compression="zlib")
    codec = struct.pack("<HHIHH", 259, 3, 1, 8, 0)
    assert codec in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(codec, struct.pack("<HHI4s", 259, 2, 4, b"\x01\nx\0")))
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(
        FrameError, match=r"text.tiff is compressed by '\\x01\\nx', expected one of none"
    ) as refusal:
        read_frame(tmp_path / "small.png", path)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_pages_in_a_circle_end(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "circle.tiff"
    tifffile.imwrite(path, np.ones((2, 16, 16, 3), np.float32), photometric="rgb", metadata=None, **options)
    with tifffile.TiffFile(path) as file:
        first, second = (page.offset for page in file.pages)
        assert len(file.pages) == 2
    content = path.read_bytes()
    order, kind = ">" if "byteorder" in options else "<", "Q" if "bigtiff" in options else "I"
    (count,) = struct.unpack_from(f"{order}{'Q' if kind == 'Q' else 'H'}", content, second)
    at = second + (8 + 20 * count if kind == "Q" else 2 + 12 * count)
    assert struct.unpack_from(f"{order}{kind}", content, at) == (0,)  # the last page names none
    path.write_bytes(
        content[:at] + struct.pack(f"{order}{kind}", first) + content[at + struct.calcsize(kind) :]
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(FrameError, match=r"circle.tiff cannot be read as TIFF \(its pages name each other"):
        read_frame(tmp_path / "small.png", path)


def test_a_file_that_its_library_trips_over_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
        tifffile.imwrite(tmp_path / f"{name}.tiff", np.ones((16, 16, 3), np.float32), photometric="rgb")
    sound = tifffile.TiffPageSeries.asarray

    def asserts(self: tifffile.TiffPageSeries, **options: object) -> object:
        assert "a.tiff" not in self.parent.filehandle.name  # as tifffile does on some damaged tags
        return sound(self, **options)

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", asserts)
    first, second = find_pairs(tmp_path)
    with pytest.raises(FrameError, match=r"a.tiff cannot be read as TIFF .* copy it again"):
        read_sample(first)
    assert read_sample(second).xyz.shape == (16, 16, 3)
