"""What the portable C++ ops cost beside what people use today: `python -m m3ad_plugins.bench [--json]`.

Ours and the other run in turn, round by round, on one full 224 x 224 cloud; the ratio of a line is the median of the
rounds' ratios, so that a machine that slows down slows both. The last line with --json is one JSON document.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
from m3ad.contract import IMAGE_SIZE
from m3ad.errors import M3adError
from scipy.spatial import cKDTree

from m3ad_plugins import native, ops
from m3ad_plugins.arrays import Float32, Int32
from m3ad_plugins.farthest_point_sample import reference as sampling
from m3ad_plugins.knn_group import reference as grouping
from m3ad_plugins.token_interpolate import reference as interpolation

NUM_SAMPLES, GROUP_SIZE, WIDTH = 1024, 32, 1152
BUCKET_HEIGHTS = (3, 5, 7, 9)
PART_POINTS = 17_064  # a part that fills a third of the image


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: medians over the rounds, other / ours as the median of the rounds' ratios."""

    name: str
    ours_ms: float
    other: str
    other_ms: float
    ratio: float


def _cloud() -> tuple[Float32, Int32]:
    """A bumpy surface 0.4 m from the camera that fills the image."""
    v, u = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].reshape(2, -1) / IMAGE_SIZE - 0.5
    noise = np.random.default_rng(0).normal(0, 2e-4, u.shape)
    points = np.stack([0.2 * u, 0.2 * v, 0.4 + 0.01 * np.sin(6 * u) * np.cos(5 * v) + noise], 1)
    return points.astype(np.float32), np.arange(IMAGE_SIZE * IMAGE_SIZE, dtype=np.int32)


def _part(points: Float32, count: int) -> tuple[Float32, Int32]:
    """The `count` points of a full cloud that lie nearest to the image's centre: a round part."""
    v, u = np.divmod(np.arange(len(points)), IMAGE_SIZE)
    distance = np.hypot(v - IMAGE_SIZE / 2, u - IMAGE_SIZE / 2)
    pixel = np.sort(distance.argsort(kind="stable")[:count]).astype(np.int32)
    return points[pixel], pixel


def _ms(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _compare(
    name: str, ours: Callable[[], Any], other_name: str, other: Callable[[], Any], rounds: int
) -> Line:
    ours(), other()
    pairs = [(_ms(ours), _ms(other)) for _ in range(rounds)]
    ratio = median(b / a for a, b in pairs)
    return Line(name, median(a for a, _ in pairs), other_name, median(b for _, b in pairs), ratio)


def _fpsample_lines(points: Float32, pixel: Int32, rounds: int) -> list[Line]:
    """FPS against every bucket height of fpsample, the fastest kept; none when fpsample is not installed."""
    if find_spec("fpsample") is None:
        sys.stderr.write("fpsample is not installed, its lines are left out: pip install fpsample\n")
        return []
    bucket = import_module("fpsample").bucket_fps_kdline_sampling
    lines = []
    for name, grid in (("FPS, pixel tiles", pixel), ("FPS, Morton runs", None)):
        others = [
            _compare(
                name,
                partial(ops.farthest_point_sample, points, NUM_SAMPLES, 0.0, grid),
                f"fpsample bucket h={height}",
                partial(bucket, points, NUM_SAMPLES, h=height),
                rounds,
            )
            for height in BUCKET_HEIGHTS
        ]
        lines.append(min(others, key=lambda line: line.other_ms))
    return lines


def _pixel_lines(points: Float32, rounds: int) -> list[Line]:
    """What `point_pixel` is worth: sampling and grouping with it and without."""
    lines = []
    for count in (PART_POINTS, len(points)):
        part, pixel = _part(points, count)
        group = partial(ops.point_group, part, NUM_SAMPLES, GROUP_SIZE, 0.0)
        name = f"point group, {count} points"
        lines.append(_compare(name, partial(group, pixel), "the same without point_pixel", group, rounds))
    return lines


def measure(rounds: int) -> list[Line]:
    """Every line of the benchmark.

    Raises:
        M3adError: the native library is not built.
    """
    if native.library() is None:
        raise M3adError("there is no native library to measure; see why: python -m m3ad_plugins.build")
    points, pixel = _cloud()
    idx = ops.farthest_point_sample(points, NUM_SAMPLES, 0.0, pixel)
    if not np.array_equal(idx, sampling.farthest_point_sample(points, NUM_SAMPLES)):
        raise AssertionError("FPS differs from the reference: the figures would mean nothing")
    centers, scored = points[idx], interpolation.scored_pixels(pixel)
    tokens = np.random.default_rng(1).normal(0, 1, (NUM_SAMPLES, WIDTH)).astype(np.float32)

    def tree() -> Any:
        return cKDTree(points).query(centers, GROUP_SIZE, workers=native.threads())

    def grouping_and_interpolation() -> None:
        ops.point_group(points, NUM_SAMPLES, GROUP_SIZE, 0.0, pixel)
        ops.token_interpolate(points, pixel, centers, tokens, scored)

    def in_numpy() -> None:
        sampling.farthest_point_sample(points, NUM_SAMPLES)
        grouping.knn_group(points, idx, GROUP_SIZE)
        interpolation.token_interpolate(points, pixel, centers, tokens, scored)

    few = max(2, rounds // 4)
    return [
        *_fpsample_lines(points, pixel, rounds),
        *_pixel_lines(points, rounds),
        _compare(
            "KNN, pixel tiles",
            lambda: ops.knn_group(points, idx, GROUP_SIZE, pixel),
            "scipy cKDTree build + query",
            tree,
            rounds,
        ),
        _compare(
            "KNN, Morton runs",
            lambda: ops.knn_group(points, idx, GROUP_SIZE),
            "scipy cKDTree build + query",
            tree,
            rounds,
        ),
        _compare(
            "interpolation, operator + apply",
            lambda: ops.token_interpolate(points, pixel, centers, tokens, scored),
            "dense NumPy form",
            lambda: interpolation.token_interpolate(points, pixel, centers, tokens, scored),
            few,
        ),
        _compare(
            "point group + interpolation", grouping_and_interpolation, "dense NumPy form", in_numpy, few
        ),
    ]


def main() -> int:
    """Print the table and, on request, the same figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m m3ad_plugins.bench", description="CPU ops, side by side")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rounds", type=int, default=21, help="paired runs per line (default 21)")
    options = parser.parse_args()
    try:
        lines = measure(options.rounds)
    except M3adError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    setting = {
        "points": IMAGE_SIZE * IMAGE_SIZE,
        "num_samples": NUM_SAMPLES,
        "group_size": GROUP_SIZE,
        "token_width": WIDTH,
        "threads": native.threads(),
        "machine": platform.machine(),
        "rounds": options.rounds,
    }
    out = sys.stdout
    out.write(", ".join(f"{key} {value}" for key, value in setting.items()) + "\n")
    for line in lines:
        out.write(
            f"{line.name:32s} {line.ours_ms:9.2f} ms   {line.other:28s} {line.other_ms:9.2f} ms"
            f"   {line.ratio:7.1f} x faster\n"
        )
    if options.json:
        out.write(json.dumps({**setting, "lines": [asdict(line) for line in lines]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
