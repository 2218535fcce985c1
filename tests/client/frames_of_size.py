"""Test frames of a category with another number of points, to time a detector on.

usage: python tests/client/frames_of_size.py CATEGORY OUT POINTS|all

POINTS of the 50,176 of a 224 x 224 image are kept, those nearest to the part's middle; `all` gives every pixel a point
instead, on waves 0.1 m deep, of which no plane removes a part. Images stay as they are, labels go: for times alone.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from m3ad.contract import IMAGE_SIZE
from m3ad.frames import find_samples, read_sample

FRAMES = 8


def nearest(xyz: npt.NDArray[np.float32], points: int) -> npt.NDArray[np.float32]:
    """The cloud with as many points as are `points` after resizing, the others not measured."""
    y, x = np.nonzero(np.isfinite(xyz[..., 2]) & (xyz[..., 2] != 0))
    far = np.argsort((y - y.mean()) ** 2 + (x - x.mean()) ** 2, kind="stable")
    cut = far[round(points * xyz.shape[0] * xyz.shape[1] / IMAGE_SIZE**2) :]
    kept = xyz.copy()
    kept[y[cut], x[cut]] = 0
    return kept


def waves(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A cloud without a gap, [H, W, 3] in metres."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    z = 0.17 + 0.05 * np.sin(x / 17) * np.cos(y / 23) + 0.007 * np.sin(x / 5) * np.sin(y / 7)
    step = 0.064 / shape[1]
    return np.stack([(x - shape[1] / 2) * step, (y - shape[0] / 2) * step, z], axis=-1).astype(np.float32)


def main() -> int:
    """Write the frames."""
    if len(sys.argv) != 4 or not (sys.argv[3] == "all" or sys.argv[3].isdigit()):
        print("usage: python tests/client/frames_of_size.py CATEGORY OUT POINTS|all", file=sys.stderr)
        return 2
    samples = find_samples(Path(sys.argv[1]), "test")
    folder = Path(sys.argv[2]) / "test" / "good"
    for name in ("rgb", "xyz"):
        (folder / name).mkdir(parents=True)
    for k, sample in enumerate(samples[:: max(1, len(samples) // FRAMES)][:FRAMES]):
        xyz = read_sample(sample).xyz
        made = waves(xyz.shape) if sys.argv[3] == "all" else nearest(xyz, int(sys.argv[3]))
        shutil.copy(sample.rgb_path, folder / "rgb" / f"{k:03d}{sample.rgb_path.suffix}")
        tifffile.imwrite(folder / "xyz" / f"{k:03d}.tiff", made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
