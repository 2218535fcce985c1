"""The portable C++ ops under AddressSanitizer and UBSan, adversarial sizes and values: ops_run.py LIBRARY CASES [SEED].

Run with the sanitizer's runtime preloaded, as `sanitized.py` does; a finding ends the process. What comes back is held
to what holds for any input: indices in range, as many as asked for, the first sample the first point.
"""

import ctypes
import sys

import numpy as np
from m3ad.scored import scored_pixels
from m3ad_plugins import native, ops
from m3ad_plugins.fpfh import in_numpy
from m3ad_plugins.nearest_row.reference import nearest_row

VALUES = (0.0, -0.0, 1e-45, 1e-38, 1.0, -1.0, 1e10, 1e19, 1e30, -3.4e38, 3.4e38)


def cloud(rng: np.random.Generator, count: int) -> np.ndarray:
    """Finite points: a surface, or with a few values many times, too large to square, or as good as zero."""
    kind = rng.integers(5)
    if kind == 0:
        points = rng.normal(size=(count, 3))
    elif kind == 1:
        points = rng.choice(VALUES, (count, 3))
    elif kind == 2:
        points = np.full((count, 3), rng.choice(VALUES))
    elif kind == 3:
        points = np.repeat(rng.normal(size=(-(-count // 7), 3)), 7, axis=0)[:count] * rng.choice(VALUES)
    else:
        points = rng.normal(size=(count, 3)) * 10.0 ** rng.integers(-40, 38, (count, 1))
    return np.clip(points, -3.4e38, 3.4e38).astype(np.float32)


def sample_and_group(rng: np.random.Generator) -> None:
    count, size = int(rng.choice((1, 2, 3, 31, 64, 65, 500, 3000))), int(rng.choice((3, 8, 55, 64, 224)))
    count = min(count, size * size)
    points = cloud(rng, count)
    pixel = rng.permutation(size * size)[:count].astype(np.int32)
    pixel = np.sort(pixel) if rng.random() < 0.5 else pixel
    grid = (pixel, size) if rng.random() < 0.7 else (None, size)
    samples, group = (int(rng.choice((1, count, rng.integers(1, count + 1)))) for _ in range(2))
    samples, least = min(samples, 400), float(rng.choice((0, 1e-3, 1e38)))
    idx, near, knn = ops.point_group(points, samples, min(group, 200), least, *grid)
    assert idx[0] == 0
    assert 0 <= idx.min() <= idx.max() < count
    assert 0 <= knn.min() <= knn.max() < count
    assert all(len(set(row)) == len(row) for row in knn[:3].tolist())
    assert near.shape == (*knn.shape, 3)
    again = ops.farthest_point_sample(points, samples, least, *grid)
    assert np.array_equal(again, idx)
    ops.knn_group(points, idx, min(group, 200), *grid)


def interpolate(rng: np.random.Generator) -> None:
    size = int(rng.choice((3, 4, 9, 40)))
    count = int(rng.integers(1, size * size + 1))
    pixel = np.sort(rng.permutation(size * size)[:count]).astype(np.int32)
    centers = cloud(rng, int(rng.choice((3, 4, 70))))
    side = size if rng.random() < 0.5 else int(rng.integers(-(-size // 4), size + 1))
    scored = scored_pixels(pixel, size, side)
    if not len(scored):
        return
    scored = scored[: rng.integers(1, len(scored) + 1)]
    try:
        operator = ops.interpolation_operator(cloud(rng, count), pixel, centers, scored, size, side)
    except ValueError as error:  # squares beyond float32 leave no weights, which is told
        if "values are NaN or infinite" not in str(error):
            raise
        return
    assert 0 <= operator.indices.min() <= operator.indices.max() < len(centers)
    tokens = cloud(rng, len(centers))[:, : rng.integers(1, 4)].copy()
    operator.apply(tokens)
    width = tokens.shape[1]
    ops.cosine_scores([operator.interpolated(tokens)], [[cloud(rng, len(scored))[:, :width].copy()]])


def score(rng: np.random.Generator) -> None:
    rows, width = int(rng.choice((1, 2, 63, 64, 300))), int(rng.choice((1, 2, 7, 64, 129)))
    values = [*VALUES, np.nan, np.inf]
    one, other = (rng.choice(values, (rows, width)).astype(np.float32) for _ in range(2))
    cut = int(rng.integers(1, width + 1))
    blocks = [np.ascontiguousarray(part) for part in (other[:, :cut], other[:, cut:]) if part.shape[1]]
    ops.cosine_scores([one], [blocks], threads=int(rng.choice((1, 2, 9))))


def judge(rng: np.random.Generator) -> None:
    rows, width, vectors = (int(rng.choice((1, 2, 15, 16, 17, 90))) for _ in range(3))
    arguments = [rng.choice(VALUES, s).astype(np.float32) for s in ((rows, width), (vectors, width), vectors)]
    ops.one_class_svm(
        *arguments,
        float(rng.choice(VALUES)),
        str(rng.choice(ops.KERNELS)),
        float(rng.choice((1e-30, 0.3, 1e30))),
    )


def find_nearest(rng: np.random.Generator) -> None:
    queries, rows, width = (int(rng.choice((1, 2, 5, 7, 31, 33, 129, 300))) for _ in range(3))
    x, bank = (rng.choice(VALUES, (n, width)).astype(np.float32) for n in (queries, rows))
    x[rng.random(queries) < 0.3] = bank[0]
    distance, idx = ops.nearest_row(x, bank)
    assert 0 <= idx.min() <= idx.max() < rows
    for query, found, expected in zip(x, idx, nearest_row(x[:3], bank)[1], strict=False):
        squared = (query.astype(np.float64) - bank[[found, expected]]) ** 2
        one, other = squared.sum(axis=1)
        # Rows of the same squares in another order are as near but for the rounding of a sum.
        assert found == expected or abs(one - other) <= width * np.finfo(np.float64).eps * other
    assert (distance >= 0).all()


def describe(rng: np.random.Generator) -> None:
    """Normals to the bit, histograms of 200 in each block or none, with pixels and without."""
    count = int(rng.choice((1, 2, 3, 64, 65, 150, 400)))
    points = cloud(rng, count)
    if rng.random() < 0.5:  # within the radii, where most are neighbours
        points = (0.05 * points / max(1e-30, float(np.abs(points).max()))).astype(np.float32)
    pixel = rng.permutation(40 * 40)[:count].astype(np.int32)
    histograms, normals = ops.fpfh(points, pixel if rng.random() < 0.5 else None, None, 40)
    expected, expected_normals = in_numpy(points, None, None, 40)
    assert np.array_equal(normals, expected_normals)
    np.testing.assert_allclose(histograms, expected, atol=1e-6)
    sums = histograms.reshape(count, 3, 11).sum(axis=2)
    assert (np.isclose(sums, 200) | np.isclose(sums, 100) | (sums == 0)).all()
    random = rng.choice((0.0, -0.0, 1.0, -1.0, 0.5), (count, 3))
    np.testing.assert_allclose(
        ops.fpfh(points, None, random)[0], in_numpy(points, None, random, 40)[0], atol=1e-6
    )


def main(library: str, cases: int, seed: int) -> None:
    """Run the cases with the library of this path."""
    loaded = ctypes.CDLL(library)
    native.library = lambda: loaded  # type: ignore[assignment]
    kinds = (sample_and_group, sample_and_group, interpolate, score, judge, find_nearest, describe)
    for number in range(cases):
        with np.errstate(all="ignore"):
            kinds[number % len(kinds)](np.random.default_rng((seed, number)))
    print(f"C++ ops under ASan and UBSan: {cases} cases, 0 findings (seed {seed})")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
