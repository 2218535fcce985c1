"""Point histograms in C++ against their specification: the same bits of normals, the same histograms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad_plugins import native, ops
from m3ad_plugins.fpfh import in_cpp, in_numpy

SIZE = 48
Arrays = tuple[np.ndarray, np.ndarray]
KINDS = ("surface", "lattice", "radius", "line", "one place", "heaps", "far apart")


def cloud(kind: str, seed: int, holes: float = 0.2) -> Arrays:
    """Points of a kind, and their pixels."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:SIZE, :SIZE].reshape(2, -1)
    if kind == "surface":
        z = 0.4 + 2e-3 * np.sin(row / 5) * np.cos(column / 7) + 3e-3 * (column > SIZE // 2)
        points = np.stack([column * 5e-4, row * 5e-4, z], axis=1) + 2e-5 * rng.normal(size=(len(z), 3))
    elif kind == "lattice":  # distances are exact and many are equal
        points = np.stack([column / 512, row / 512, 0.5 + (row // 8 + column // 8) / 256], axis=1)
    elif kind == "radius":  # two steps are the histograms' radius
        points = np.stack([column / 8, row / 8, np.full(len(row), 0.5)], axis=1)
    elif kind == "line":
        points = np.outer(np.arange(1, len(row) + 1) / 4096, (1, 2, 0.5))
    elif kind == "one place":
        points = np.full((len(row), 3), 0.3)
    elif kind == "heaps":  # more points in one place than are kept
        points = np.repeat(rng.normal((0, 0, 0.5), 0.01, (-(-len(row) // 150), 3)), 150, axis=0)[: len(row)]
        rng.shuffle(points)
    else:
        points = rng.normal(0, 1, (len(row), 3)) * 10.0 ** rng.integers(-3, 2, (len(row), 1))
    kept = rng.random(len(row)) >= holes
    kept[0] = True
    return points[kept].astype(np.float32), (row * SIZE + column)[kept].astype(np.int32)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), holes=st.sampled_from((0, 0.2, 0.8, 0.99, 1))
)
def test_the_specification_bit_for_bit(kind: str, seed: int, holes: float) -> None:
    """Normals are the same bits; histograms differ by the order of a sum of up to 99 terms."""
    points, pixel = cloud(kind, seed, holes)
    expected, expected_normals = in_numpy(points, pixel, None, SIZE)
    for grid in (pixel, None):
        found, normals = ops.fpfh(points, grid, None, SIZE)
        np.testing.assert_array_equal(normals, expected_normals)
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_given_normals_are_taken(kind: str) -> None:
    """At random, so that every bin is met."""
    points, pixel = cloud(kind, 1)
    normals = np.random.default_rng(2).normal(size=points.shape)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    found, taken = ops.fpfh(points, pixel, normals, SIZE)
    np.testing.assert_array_equal(taken, normals)
    np.testing.assert_allclose(found, in_numpy(points, pixel, normals, SIZE)[0], atol=1e-9)
    if kind == "surface":
        assert (found > 0).any(axis=0).all()


def test_opposite_normals_of_a_plane_are_half_a_turn_either_way() -> None:
    """theta is exactly pi or -pi by the sign of a zero: the last bin or the first, as NumPy's arctan2 has it."""
    points, pixel = cloud("lattice", 3, 0)
    points[:, 2] = 0.5
    normals = np.zeros(points.shape)
    normals[:, 2] = np.where(pixel % 2, 1, -1)
    found = ops.fpfh(points, pixel, normals, SIZE)[0]
    np.testing.assert_allclose(found, in_numpy(points, pixel, normals, SIZE)[0], atol=1e-9)
    assert found[:, [0, 10]].sum(axis=1).min() > 0


def test_zeros_of_either_sign_turn_as_arctan2_has_them() -> None:
    """Normals along the axes: sine and cosine of theta are zeros of all signs."""
    points, pixel = cloud("lattice", 8)
    rng = np.random.default_rng(9)
    normals = rng.choice((0.0, -0.0), points.shape)
    normals[np.arange(len(points)), rng.integers(0, 3, len(points))] = rng.choice((1, -1), len(points))
    found = ops.fpfh(points, pixel, normals, SIZE)[0]
    np.testing.assert_allclose(found, in_numpy(points, pixel, normals, SIZE)[0], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points, pixel = cloud(kind, 4)
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(native, "threads", lambda count=threads: count)
        results.append(in_cpp(points, pixel, None, SIZE))
    for histograms, normals in results[1:]:
        np.testing.assert_array_equal(histograms, results[0][0])
        np.testing.assert_array_equal(normals, results[0][1])


def test_what_a_histogram_sums_to() -> None:
    points, pixel = cloud("far apart", 5)
    found, normals = ops.fpfh(points, pixel, None, SIZE)
    square = ((points[:, None].astype(np.float64) - points) ** 2).sum(axis=2)
    others = np.sort(square, axis=1)[:, 1:]
    sums = found.reshape(-1, 3, 11).sum(axis=2)
    np.testing.assert_allclose(sums[others[:, 0] < 0.0625], 200)
    np.testing.assert_array_equal(sums[others[:, 0] >= 0.0625], 0)
    assert (others[:, 0] >= 0.0625).sum() > 50
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    assert ((normals * points).sum(axis=1) <= 1e-9).all()


def test_without_the_library_numpy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    points, pixel = cloud("surface", 6, 0.8)
    expected = ops.fpfh(points, pixel, None, SIZE)
    monkeypatch.setattr(native, "library", lambda: None)
    found = ops.fpfh(points, pixel, None, SIZE)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-9)
    np.testing.assert_array_equal(found[1], expected[1])


POINTS = np.ones((8, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.fpfh(POINTS[:0]), "points: expected at least 1, got 0"),
        (lambda: ops.fpfh(POINTS * np.nan), "points: 24 of 24 values are NaN or infinite"),
        (
            lambda: ops.fpfh(POINTS, np.zeros(8, np.int32)),
            "point_pixel: pixel 0 is named by 8 points, expected one",
        ),
        (lambda: ops.fpfh(POINTS, None, POINTS), r"normals: expected float64 \[8, 3\], got float32 \[8, 3\]"),
        (
            lambda: ops.fpfh(POINTS, None, np.full((8, 3), np.inf)),
            "normals: 24 of 24 values are NaN or infinite; expected unit vectors",
        ),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
