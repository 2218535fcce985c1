"""Each fault of a folder of frames is found in its own row, and sound frames have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from m3ad.errors import FrameError
from m3ad.frames import Frame
from m3ad_client import cli
from m3ad_client.check_frames import check_frames, failing
from PIL import Image
from serving import write_frame
from typer.testing import CliRunner

SIZE = 160
SPLITS = {"train/good": 4, "validation/good": 2, "test/good": 2, "test/dent": 2}


def plate(seed: int) -> Frame:
    """An L-shaped plate with ribs, painted where they are, in the middle of a dark frame."""
    rng = np.random.default_rng(seed)
    v, u = np.indices((SIZE, SIZE))
    top, left = rng.integers(20, 26, 2)
    part = (v >= top) & (v < 140) & (u >= left) & (u < 130) & ~((v < 70) & (u > 80))
    rib = part & (((u - left) // 17 + (v - top) // 29) % 3 == 0)
    z = 0.5 - 0.004 * rib + rng.normal(0, 5e-5, part.shape)
    xyz = np.stack([(u - 80) / 800, (v - 80) / 800, z], axis=-1).astype(np.float32)
    xyz[~part] = 0
    grey = 40 + 120 * part - 50 * rib + rng.normal(0, 4, part.shape)
    return Frame(
        np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2), xyz, f"plate {seed}"
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, seed = tmp_path_factory.mktemp("sound"), 0
    for folder, count in SPLITS.items():
        for number in range(count):
            write_frame(root / folder, f"{number:03}", plate(seed))
            seed += 1
            if folder == "test/dent":
                (root / folder / "gt").mkdir(exist_ok=True)
                Image.new("L", (SIZE, SIZE), 255).save(root / folder / f"gt/{number:03}.png")
    return root


def every_cloud(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in root.rglob("*.tiff"):
        tifffile.imwrite(path, change(tifffile.imread(path)).astype(np.float32), photometric="minisblack")


def one_cloud(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = root / "train/good/xyz/002.tiff"
    tifffile.imwrite(path, change(tifffile.imread(path)).astype(np.float32), photometric="minisblack")


def numbered(xyz: np.ndarray) -> np.ndarray:
    return np.where((xyz == 0).all(axis=2, keepdims=True), -9999, xyz)


def truncated(root: Path) -> None:
    path = root / "validation/good/rgb/001.png"
    path.write_bytes(path.read_bytes()[:100])


def another_size(root: Path) -> None:
    frame = plate(0)
    write_frame(root / "train/good", "002", Frame(frame.rgb[:150].copy(), frame.xyz[:150].copy(), "x"))


def copied(root: Path) -> None:
    shutil.copy(root / "train/good/rgb/001.png", root / "test/good/rgb/001.png")


def moved(root: Path) -> None:
    (root / "test/dent").rename(root / "train/dent")


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "files": (truncated, "001.png cannot be read as an image", "validation/good/001"),
    "sizes": (another_size, "9 of 160x160, 1 of 160x150", "train/good/002"),
    "holes": (lambda r: one_cloud(r, numbered), "declare it with --hole -9999", "train/good/002"),
    "units": (lambda r: every_cloud(r, lambda x: x * 1000), "if these are millimetres, divide by 1000", ""),
    "units of one": (lambda r: one_cloud(r, lambda x: x * 100), "m is usual: another unit", "train/good/002"),
    "coverage": (
        lambda r: one_cloud(r, lambda x: np.where(np.arange(SIZE)[:, None, None] < 110, 0, x)),
        "are the fewest",
        "train/good/002",
    ),
    "registration": (
        lambda r: every_cloud(r, lambda x: np.roll(x, (-6, 5), (0, 1))),
        "moved -7 px across and +8 px down on the 224 grid",
        "",
    ),
    "registration mirrored": (lambda r: every_cloud(r, lambda x: x[:, ::-1]), "mirrored left to right", ""),
    "plane": (
        lambda r: one_cloud(r, lambda x: np.where(x == 0, np.float32([0.1, 0.1, 0.6]) + 0 * x, x) + grid(x)),
        "1 of 10 frames show their support, the others not",
        "train/good/000, train/good/001, train/good/003 and 6 more",
    ),
    "duplicates": (copied, "1 picture or cloud is there twice; some", "train/good/001, test/good/001"),
    "splits": (moved, "the split 'train' is for good parts only", ""),
}  # fmt: skip


def grid(xyz: np.ndarray) -> np.ndarray:
    """A floor's x and y where there was none."""
    v, u = np.indices(xyz.shape[:2])
    floor = np.stack([(u - 80) / 800 - 0.1, (v - 80) / 800 - 0.1, 0 * u], axis=-1)
    return np.where((xyz == 0).all(axis=2, keepdims=True), floor, 0)


def test_sound_frames_have_no_fault(sound: Path) -> None:
    checks = {check.name: check for check in check_frames(sound)}
    assert failing([*checks.values()]) == []
    assert list(checks) == [
        "files", "sizes", "holes", "units", "coverage", "registration", "plane", "duplicates", "splits",
    ]  # fmt: skip
    assert checks["splits"].found == "4 train, 2 validation, 4 test"
    assert checks["units"].found.startswith("metres: the points of a frame are 0.1")
    assert checks["registration"].found.startswith("edges of XYZ and RGB agree where they are")
    assert checks["plane"].found == "no support is seen at the border: train with --plane none"
    plain = {check.name: check.found for check in check_frames(sound / "test/good")}
    assert plain["splits"] == "none: a plain folder, for inspection only"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_its_row(fault: str, sound: Path, tmp_path: Path) -> None:
    spoil, found, frames = FAULTS[fault]
    shutil.copytree(sound, tmp_path / "plate")
    spoil(tmp_path / "plate")
    checks = {check.name: check for check in check_frames(tmp_path / "plate")}
    check = checks[fault.partition(" ")[0]]
    assert not check.is_ok
    assert found in check.found
    assert check.cells()[3] == frames
    if fault not in ("units", "units of one", "splits"):  # what one makes of the others
        assert failing([*checks.values()]) == [check.name]


def test_command_prints_one_table_and_fails(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "plate [v2]")
    done = CliRunner().invoke(cli.app, ["check-frames", str(tmp_path / "plate [v2]")])
    assert done.exit_code == 0, done.output
    every_cloud(tmp_path / "plate [v2]", numbered)
    done = CliRunner().invoke(cli.app, ["check-frames", str(tmp_path / "plate [v2]"), "--json"])
    assert isinstance(done.exception, FrameError)
    assert str(done.exception).endswith("plate [v2] cannot be trained on as it is: look at holes")
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert [c["name"] for c in told["checks"] if not c["is_ok"]] == ["holes"]
    declared = ["check-frames", str(tmp_path / "plate [v2]"), "--hole", "-9999", "--markdown"]
    done = CliRunner().invoke(cli.app, declared)
    assert done.exit_code == 0, done.output
    assert "| sizes | ok | 10 of 160x160; the detectors see 224x224 |" in done.stdout
    (tmp_path / "empty").mkdir()
    assert "holds no frames" in str(
        CliRunner().invoke(cli.app, ["check-frames", str(tmp_path / "empty")]).exception
    )
