"""What point histograms cost in C++, NumPy and Open3D on frames' clouds: `python -m m3ad_plugins.bench_fpfh DATA ..`.

The forms run in turn, round by round, normals and histograms from float32 points on; a ratio is the median of the
rounds' ratios, of elapsed time and of processor time of all threads (the latter hardly depends on what else runs).
Open3D's lines are left out where it is not installed (`pip install 'm3ad[open3d]'`). With --json the last line is one
JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from m3ad.errors import M3adError
from m3ad.fpfh import NEIGHBORS, NORMAL_NEIGHBORS, NORMAL_RADIUS_M, RADIUS_M, FloatArray
from m3ad.frame_settings import Preprocessing
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare

from m3ad_plugins import native, ops
from m3ad_plugins.arrays import Float32, Int32
from m3ad_plugins.fpfh import in_numpy

Form = Callable[[], tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, slots=True)
class Line:
    """One form on one cloud: medians over the rounds; ratios to the C++ form; differences of 200 a block.

    Attributes:
        normals: largest difference to those in C++ of a coordinate.
        largest: of the histograms in C++ with this form's normals, to its own.
        mean: of the histograms in C++ with their own normals, to this form's.
    """

    cloud: str
    points: int
    form: str
    elapsed_ms: float
    processor_ms: float
    elapsed_ratio: float
    processor_ratio: float
    normals: float
    largest: float
    mean: float


def in_open3d(points: Float32) -> tuple[FloatArray, FloatArray]:
    """Histograms and normals towards the sensor, of Open3D."""
    open3d = import_module("open3d")
    made = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
    search = open3d.geometry.KDTreeSearchParamHybrid
    made.estimate_normals(search(radius=NORMAL_RADIUS_M, max_nn=NORMAL_NEIGHBORS))
    made.orient_normals_towards_camera_location(np.zeros(3))
    found = open3d.pipelines.registration.compute_fpfh_feature(
        made, search(radius=RADIUS_M, max_nn=NEIGHBORS)
    )
    return np.ascontiguousarray(np.asarray(found.data).T), np.asarray(made.normals).copy()


def _times(form: Form) -> tuple[float, float]:
    elapsed, processor = time.perf_counter(), time.process_time()
    form()
    return 1e3 * (time.perf_counter() - elapsed), 1e3 * (time.process_time() - processor)


def compare(name: str, points: Float32, pixel: Int32, rounds: int) -> list[Line]:
    """The forms that are here, C++ first."""
    forms: dict[str, Form] = {
        "C++": lambda: ops.fpfh(points, pixel),
        "NumPy": lambda: in_numpy(points, pixel, None, 0),
    }
    if find_spec("open3d") is not None:
        forms["Open3D"] = lambda: in_open3d(points)
    found = {form: run() for form, run in forms.items()}
    times = [{form: _times(run) for form, run in forms.items()} for _ in range(rounds)]
    ours = found["C++"]
    lines = []
    for form, (histograms, normals) in found.items():
        elapsed, processor = (median(each[form][clock] for each in times) for clock in (0, 1))
        of_elapsed, of_processor = (
            median(each[form][clock] / each["C++"][clock] for each in times) for clock in (0, 1)
        )
        with_these = ops.fpfh(points, pixel, normals)[0]
        lines.append(
            Line(
                name,
                len(points),
                form,
                elapsed,
                processor,
                of_elapsed,
                of_processor,
                normals=float(np.abs(normals - ours[1]).max()),
                largest=float(np.abs(with_these - histograms).max()),
                mean=float(np.abs(ours[0] - histograms).mean()),
            )
        )
    return lines


def measure(folders: list[Path], rounds: int) -> list[Line]:
    """Every form on the first test frame of each folder, all of its points.

    Raises:
        M3adError: the native library is not built, or a folder has no frames.
    """
    if native.library() is None:
        raise M3adError("there is no native library to measure; see why: python -m m3ad_plugins.build")
    lines = []
    for folder in folders:
        frame = read_sample(find_samples(folder, "test")[0])
        prepared = prepare(frame, Preprocessing(plane="none"))
        lines += compare(f"{folder.name}/{frame.name}", prepared.points, prepared.point_pixel, rounds)
    return lines


def main() -> int:
    """Print the table and, on request, the same figures as one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m m3ad_plugins.bench_fpfh", description="point histograms, side by side"
    )
    parser.add_argument("data", type=Path, nargs="+", help="a category's folder")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form (default 5)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    try:
        lines = measure(options.data, options.rounds)
    except M3adError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    setting: dict[str, Any] = {"threads": native.threads(), "rounds": options.rounds}
    out = sys.stdout
    out.write(", ".join(f"{key} {value}" for key, value in setting.items()) + "\n")
    for line in lines:
        out.write(
            f"{line.cloud:24s} {line.points:6d} points  {line.form:6s} {line.elapsed_ms:9.1f} ms "
            f"({line.elapsed_ratio:.1f} x), processor {line.processor_ms:9.1f} ms ({line.processor_ratio:.1f} x)   "
            f"normals {line.normals:.1e}, histograms {line.largest:.1e} at most with these, "
            f"mean {line.mean:.1e} with own\n"
        )
    if options.json:
        out.write(json.dumps({**setting, "lines": [asdict(line) for line in lines]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
