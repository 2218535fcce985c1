"""One bad frame of a folder gets its sentence and never stops the next."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad.frames import Frame
from m3ad_client.infer import find_inputs, inspect_samples
from m3ad_runtime.pipeline import Inspector
from PIL import Image
from serving import make_frame, write_frame

LARGEST = float(np.finfo(np.float32).max)
BAD = {
    "deep": "expected an 8-bit RGB or grey image",
    "float-max": "points have x = 3.4028235e+38, far from all others",
    "minus-9999": "declare it with --hole -9999 in m3ad-export train",
    "millimetres": "divide it by 1000",
    "unorganised": "says that it is unorganized",
    "damaged": "cannot be read as TIFF",
}


def holed(frame: Frame, value: float) -> Frame:
    xyz = frame.xyz.copy()
    xyz[np.random.default_rng(0).random(xyz.shape[:2]) < 0.03] = value
    return Frame(frame.rgb, xyz, frame.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frame = make_frame(0)
    middle = np.nanmean(np.where(frame.xyz == 0, np.nan, frame.xyz), axis=(0, 1)).astype(np.float32)
    near = np.where((frame.xyz == 0).all(axis=2, keepdims=True), np.float32(0), (frame.xyz - middle) * 1000)
    frames = {
        "float-max": holed(frame, LARGEST),
        "minus-9999": holed(frame, -9999),
        "millimetres": Frame(frame.rgb, near, "near"),
        **dict.fromkeys(("deep", "unorganised", "damaged", "good", "zz-good"), frame),
    }
    paths = {name: write_frame(tmp_path, name, f) for name, f in frames.items()}
    Image.fromarray(frame.rgb[..., 0].astype(np.uint16) * 16).save(paths["deep"][0])
    head = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {120 * 120}\nHEIGHT 1\nDATA binary\n"
    paths["unorganised"][1].unlink()
    paths["unorganised"][1].with_suffix(".pcd").write_bytes(head.encode() + frame.xyz.tobytes())
    content = paths["damaged"][1].read_bytes()
    paths["damaged"][1].write_bytes(content[: len(content) // 2])
    return tmp_path


def test_a_folder_of_bad_frames_is_gone_through(tiny_bundle: Bundle, folder: Path) -> None:
    inspector = Inspector(tiny_bundle)
    inspector.preprocessing = replace(inspector.preprocessing, extent_m=0.2)
    results = {r.frame: r for r in inspect_samples(inspector, find_inputs([folder], "test"), folder / "out")}
    assert results.keys() == {*BAD, "good", "zz-good"}
    for name, message in BAD.items():
        assert message in (results[name].error or ""), name
        assert results[name].score is None
        assert not list((folder / "out").glob(f"{name}*"))
    assert results["good"].score == results["zz-good"].score is not None
