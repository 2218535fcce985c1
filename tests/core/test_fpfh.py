"""Histograms of a cloud's points: against figures of Open3D, Open3D where it is installed, and a naive form."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.fpfh import Neighbors, camera_normals, cell_pooling, fpfh, fpfh_cells, in_numpy, smallest_axis, spfh
from m3ad_plugins import ops

GOLDEN = Path(__file__).parents[1] / "golden" / "fpfh_open3d.npz"
Array = npt.NDArray[np.float64]
Form = Callable[..., tuple[Array, Array]]


def cloud(
    seed: int, side: int = 40, noise: float = 2e-5, holes: float = 0.1
) -> tuple[Array, npt.NDArray[np.int32]]:
    """A wavy plate of float32 points with holes, a step and two points far from all others, and their pixels."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side]
    z = 0.4 + 2e-3 * np.sin(row / 5) * np.cos(column / 7) + 3e-3 * (column > side // 2)
    xyz = np.stack([(column - side / 2) * 5e-4, (row - side / 2) * 5e-4, z], axis=2)
    xyz += noise * rng.standard_normal(xyz.shape)
    xyz[2, 3], xyz[side - 2, side // 2] = (1.5, 0, 1), (-2, 0, 1)
    kept = rng.random((side, side)) >= holes
    kept[2, 3] = kept[side - 2, side // 2] = True
    pixel = (row * 224 + column)[kept].astype(np.int32)
    return xyz[kept].astype(np.float32).astype(np.float64), pixel


def naive(points: Array, normals: Array, i: int) -> Array:
    """SPFH of a point, pair by pair, as the definition reads."""
    square = np.square(points - points[i]).sum(axis=1)
    near = [j for j in np.argsort(square, kind="stable")[:100] if square[j] < 0.0625]
    out = np.zeros(33)
    for j in near[1:]:
        angles = np.zeros(3)
        d = points[j] - points[i]
        length = np.linalg.norm(d)
        if length > 0:
            a, b = normals[i], normals[j]
            first, second = a @ d / length, b @ d / length
            phi = first
            if np.arccos(abs(first)) > np.arccos(abs(second)):
                a, b, d, phi = b, a, -d, -second
            v = np.cross(d, a)
            if np.linalg.norm(v) > 0:
                v /= np.linalg.norm(v)
                angles[:] = np.arctan2(np.cross(a, v) @ b, a @ b), v @ b, phi
        shares = ((angles[0] + np.pi) / (2 * np.pi), (angles[1] + 1) / 2, (angles[2] + 1) / 2)
        for block, share in enumerate(shares):
            out[11 * block + min(max(int(np.floor(11 * share)), 0), 10)] += 100 / (len(near) - 1)
    return out


def test_figures_that_open3d_gave() -> None:
    golden = np.load(GOLDEN)
    points, _ = cloud(7, 30)
    neighbors = Neighbors(points)
    found = fpfh(points, golden["normals"], neighbors)
    np.testing.assert_allclose(found[::9], golden["fpfh"], atol=1e-9)
    alone = np.flatnonzero(neighbors.counts == 1)
    assert len(alone) == 2
    np.testing.assert_array_equal(found[alone], 0)
    others = np.delete(found, alone, axis=0).reshape(-1, 3, 11)
    np.testing.assert_allclose(others.sum(axis=2), 200)


def test_normals_are_those_of_open3d() -> None:
    """Where two points have the same neighbours, Open3D's rounding of their one normal decides which is the first."""
    golden = np.load(GOLDEN)
    points, _ = cloud(7, 30)
    neighbors = Neighbors(points)
    normals = camera_normals(points, neighbors)
    np.testing.assert_allclose(normals, golden["normals"], atol=1e-8)
    np.testing.assert_array_equal(normals[neighbors.counts == 1], [(0, 0, -1)] * 2)
    difference = np.abs(fpfh(points, normals, neighbors)[::9] - golden["fpfh"])
    assert difference.max() < 5  # of 200
    assert difference.mean() < 0.01


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]),
    holes=st.floats(0, 0.97),
    copies=st.integers(0, 9),
)
def test_a_histogram_is_that_of_its_definition(seed: int, noise: float, holes: float, copies: int) -> None:
    """With normals at random, so that every bin is met; some points twice, few or many neighbours.

    Which of two at the same distance is the hundredth is anybody's choice: such points are passed over.
    """
    points, _ = cloud(seed, 12, noise, holes)
    rng = np.random.default_rng(seed)
    points = np.concatenate([points, points[rng.integers(0, len(points), copies)]])
    normals = rng.standard_normal(points.shape)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    neighbors = Neighbors(points)
    i = int(rng.integers(len(points)))
    simple = spfh(points, normals, neighbors)
    if not _tied(points, i):
        np.testing.assert_allclose(simple[i], naive(points, normals, i), atol=1e-9)
        square = np.square(points - points[i]).sum(axis=1)
        near = [j for j in np.argsort(square, kind="stable")[:100] if 0 < square[j] < 0.0625]
        blocks = sum((simple[j] / square[j] for j in near), np.zeros(33)).reshape(3, 11)
        total = blocks.sum(axis=1, keepdims=True)
        scaled = np.divide(100 * blocks, total, out=np.zeros((3, 11)), where=total > 0)
        np.testing.assert_allclose(fpfh(points, normals, neighbors)[i], simple[i] + scaled.ravel(), atol=1e-6)


def _tied(points: Array, j: int) -> bool:
    square = np.sort(np.square(points - points[j]).sum(axis=1))
    return len(square) > 100 and square[99] > square[100] * (1 - 1e-9)


def test_a_normal_is_across_a_plane_and_towards_the_sensor() -> None:
    rng = np.random.default_rng(2)
    plane = np.array((0.6, 0.0, -0.8))
    along = np.linalg.svd(plane[None])[2][1:]
    points = rng.uniform(-0.02, 0.02, (500, 2)) @ along + (0.05, 0, 0.5)
    np.testing.assert_allclose(camera_normals(points, Neighbors(points)), np.tile(plane, (500, 1)), atol=1e-9)


def test_points_that_show_no_normal_give_finite_histograms() -> None:
    """On a line, all in one place, and fewer than three."""
    line = np.linspace(0.4, 0.5, 200)[:, None] * (0.1, 0.2, 1)
    for points in (line, np.full((50, 3), 0.3), line[:2], line[:1]):
        neighbors = Neighbors(points)
        normals = camera_normals(points, neighbors)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
        assert (np.sum(normals * points, axis=1) <= 1e-9).all()
        found = fpfh(points, normals, neighbors)
        assert np.isfinite(found).all()
        assert (found >= 0).all()


def test_cells_are_pytorchs_means() -> None:
    points, pixel = cloud(3)
    neighbors = Neighbors(points)
    grid = torch.zeros(224 * 224, 33, dtype=torch.float64)
    grid[torch.from_numpy(pixel).long()] = torch.from_numpy(
        fpfh(points, camera_normals(points, neighbors), neighbors)
    )
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(3, stride=1), torch.nn.AdaptiveAvgPool2d(28))
    expected = pool(grid.T.reshape(1, 33, 224, 224)).flatten(2)[0].T
    found = fpfh_cells(points.astype(np.float32), pixel)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert cell_pooling().sum(axis=1) == pytest.approx(1)


def nearest(points: Array, i: int, most: int) -> tuple[npt.NDArray[np.intp], Array]:
    """By (distance, index), nearer than 0.25 m, of all points."""
    square = np.square(points[:, 0] - points[i, 0]) + np.square(points[:, 1] - points[i, 1])
    square += np.square(points[:, 2] - points[i, 2])
    order = np.lexsort((np.arange(len(points)), square))[:most]
    order = order[square[order] < 0.0625]
    return order, square[order]


@pytest.mark.parametrize("step", [0.015625, 0.125])
def test_of_equally_near_points_the_lowest_are_taken(step: float) -> None:
    """A lattice whose distances are exact, some points twice; at 0.125 two steps are the radius itself."""
    axes = np.mgrid[:9, :9, :3].reshape(3, -1).T * step
    points = np.concatenate([axes, axes[::17], np.repeat(axes[40:41], 120, axis=0)])
    neighbors = Neighbors(points)
    for i in range(0, len(points), 7):
        index, square = nearest(points, i, 100)
        count = len(index)
        assert neighbors.counts[i] == count
        np.testing.assert_array_equal(neighbors.index[i, :count], index)
        np.testing.assert_array_equal(neighbors.square[i, :count], square)
        assert (neighbors.index[i, count:] == i).all()


def test_points_with_the_same_neighbours_have_the_same_normal() -> None:
    """To the bit, so that neither of the two comes first in a pair by rounding."""
    points = np.random.default_rng(3).normal((0.1, 0, 0.6), 0.005, (20, 3))
    normals = camera_normals(points, Neighbors(points))
    assert len(np.unique(normals, axis=0)) == 1


def test_smallest_axes_are_lapacks() -> None:
    rng = np.random.default_rng(5)
    made = rng.normal(0, 1, (300, 4, 3)) * 10.0 ** rng.integers(-18, 4, (300, 1, 1))
    made[:100] *= (1, 1e-3, 1e-6)
    matrices = made.transpose(0, 2, 1) @ made
    values, vectors = np.linalg.eigh(matrices)
    found = smallest_axis(matrices.transpose(1, 2, 0).copy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-14)
    along = np.abs((found * vectors[:, :, 0]).sum(axis=1))
    assert (1 - along <= 1e-13 * values[:, 2] / (values[:, 1] - values[:, 0])).all()


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'm3ad_plugins':
            raise ModuleNotFoundError(f'no module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
from m3ad.fpfh import fpfh_cells
given = np.load(sys.argv[1])
np.save(sys.argv[2], fpfh_cells(given['points'], given['pixel']))
"""


def test_cells_are_the_same_where_the_ops_are_not_installed(tmp_path: Path) -> None:
    points, pixel = cloud(11, 30)
    given = {"points": points.astype(np.float32), "pixel": pixel}
    np.savez(tmp_path / "given.npz", **given)
    subprocess.run([sys.executable, "-c", ABSENT, tmp_path / "given.npz", tmp_path / "cells.npy"], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "cells.npy"), fpfh_cells(given["points"], pixel), rtol=1e-6)


@pytest.mark.parametrize("form", [in_numpy, lambda points, normals=None: ops.fpfh(points, None, normals)])
@pytest.mark.parametrize("seed", range(4))
def test_open3d_itself(seed: int, form: Form) -> None:
    open3d = pytest.importorskip("open3d", reason="open3d is not installed: pip install open3d==0.19.0")
    points, _ = cloud(seed, 60, noise=1e-4 / (seed + 1), holes=0.2 * seed)
    made = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    search = open3d.geometry.KDTreeSearchParamHybrid
    made.estimate_normals(search(radius=0.1, max_nn=30))
    made.orient_normals_towards_camera_location(np.zeros(3))
    feature = open3d.pipelines.registration.compute_fpfh_feature(made, search(radius=0.25, max_nn=100))
    theirs, expected = np.asarray(made.normals), np.asarray(feature.data).T
    histograms, normals = form(points.astype(np.float32))
    apart = Neighbors(points).counts > 2
    np.testing.assert_allclose(normals[apart], theirs[apart], atol=1e-6)
    np.testing.assert_allclose(form(points.astype(np.float32), theirs)[0], expected, atol=1e-9)
    assert np.abs(histograms - expected).mean() < 0.02
