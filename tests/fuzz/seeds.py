"""Small sound files of every kind that is read, for damage to begin with."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

SIDE = 12
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
CLOUD = (RNG.random((SIDE, SIDE, 3)) + 0.5).astype(np.float32)
CAMERA = {"width": SIDE, "height": SIDE, "fx": 20.0, "fy": 20.0, "cx": 6.0, "cy": 6.0, "depth_scale": 0.001}


def _packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _pcd(form: str) -> bytes:
    fields = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
    head = f"VERSION .7\n{fields}WIDTH {SIDE}\nHEIGHT {SIDE}\nPOINTS {SIDE * SIDE}\nDATA {form}\n".encode()
    if form == "ascii":
        return head + "\n".join(" ".join(map(str, p)) for p in CLOUD.reshape(-1, 3)).encode()
    if form == "binary":
        return head + CLOUD.tobytes()
    plain = CLOUD.reshape(-1, 3).T.tobytes()
    packed = imagecodecs.lzf_encode(plain)
    return head + struct.pack("<II", len(packed), len(plain)) + packed


def _ply(form: str) -> bytes:
    head = f"ply\nformat {form} 1.0\nelement vertex {SIDE * SIDE}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    if form == "ascii":
        return head.encode() + "\n".join(" ".join(map(str, p)) for p in CLOUD.reshape(-1, 3)).encode()
    return head.encode() + CLOUD.astype(">f4" if "big" in form else "<f4").tobytes()


def pictures() -> dict[str, bytes]:
    """Pictures by file name."""
    image, grey = Image.fromarray(PICTURE), Image.fromarray(PICTURE[..., 0])
    deep = imagecodecs.png_encode((PICTURE.astype(np.uint16) << 8) | 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb: dict[str, Any] = {"photometric": "rgb"}
    return {
        "rgb.png": _packed(image, "PNG"),
        "grey.png": _packed(grey, "PNG"),
        "alpha.png": _packed(image.convert("RGBA"), "PNG"),
        "palette.png": _packed(image.convert("P"), "PNG"),
        "deep.png": bytes(deep),
        "rgb.jpg": _packed(image, "JPEG"),
        "turned.jpg": _packed(image, "JPEG", exif=exif),
        "cmyk.jpg": _packed(image.convert("CMYK"), "JPEG"),
        "rgb.bmp": _packed(image, "BMP"),
        "rgb.webp": _packed(image, "WEBP", lossless=True),
        "rgb.tif": _tiff(PICTURE, **rgb),
        "deflate.tif": _tiff(PICTURE, compression="zlib", **rgb),
        "lzw.tif": _tiff(PICTURE, compression="lzw", predictor=True, **rgb),
        "tiles.tif": _tiff(PICTURE, tile=(16, 16), **rgb),
        "big.tif": _tiff(PICTURE, bigtiff=True, byteorder=">", **rgb),
        "grey.tif": _tiff(PICTURE[..., 0], photometric="miniswhite"),
    }


def clouds() -> dict[str, bytes]:
    """Clouds and depth images by file name."""
    depth = (CLOUD[..., 2] * 1000).astype(np.uint16)
    return {
        "cloud.tiff": _tiff(CLOUD, photometric="minisblack"),
        "rgb.tiff": _tiff(CLOUD, photometric="rgb", compression="zlib", predictor=True),
        "planes.tiff": _tiff(np.moveaxis(CLOUD, -1, 0).copy(), photometric="minisblack"),
        "double.tiff": _tiff(CLOUD.astype(np.float64), photometric="minisblack", compression="packbits"),
        "depth.tiff": _tiff(depth),
        "cloud.npy": _npy(CLOUD),
        "double.npy": _npy(CLOUD.astype(">f8")),
        "depth.npy": _npy(depth),
        "depth.png": _packed(Image.fromarray(depth), "PNG"),
        "ascii.pcd": _pcd("ascii"),
        "binary.pcd": _pcd("binary"),
        "packed.pcd": _pcd("binary_compressed"),
        "ascii.ply": _ply("ascii"),
        "little.ply": _ply("binary_little_endian"),
        "big.ply": _ply("binary_big_endian"),
    }


def write(folder: Path) -> None:
    """The sound partners of damaged files: a picture, a cloud and a camera."""
    (folder / "sound.png").write_bytes(pictures()["rgb.png"])
    (folder / "sound.npy").write_bytes(clouds()["cloud.npy"])
    (folder / "intrinsics.json").write_text(json.dumps(CAMERA))
