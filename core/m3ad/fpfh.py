"""Fast point feature histograms of a cloud, and their means over the cells of the grid, for banks of geometry.

References:
    FPFH (Rusu et al. 2009), in the form and with the bins of Open3D 0.19, which BTF uses; written anew
    BTF (Horwitz, Hoshen 2023)  https://github.com/eliahuhorwitz/3D-ADS (MIT): radii, neighbours, pooling
Points are [N, 3] float32 in metres; all is computed in float64. What is here is the specification, in NumPy;
`fpfh_cells` takes the C++ form of `m3ad_plugins.fpfh` where that is. Both find the same neighbours and the same bits of
normals and of SPFH: so far only + - * / and roots are taken, each rounded once, in the same order.
"""

from functools import cache
from importlib import import_module

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from m3ad.contract import IMAGE_SIZE

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

NORMAL_RADIUS_M, NORMAL_NEIGHBORS = 0.1, 30
RADIUS_M, NEIGHBORS = 0.25, 100
BINS = 11
WIDTH = 3 * BINS
CELL_SIDE = 28
CELLS = CELL_SIDE * CELL_SIDE
POINTS_AT_ONCE = 256  # whose pairs lie in a cache
SEARCHED_AT_ONCE = 4096
LEAST_NEIGHBORS = 3  # for a covariance; below it a normal is (0, 0, 1), as in Open3D
SWEEPS = 6  # of Jacobi rotations, after which an axis of 3 no longer moves
SLACK = 1 + 1e-9  # more than a tree's distances are rounded by


class Neighbors:
    """The nearest neighbours of every point within RADIUS_M by (distance, index), for normals and histograms.

    Attributes:
        index: [N, K] into the points, K = min(N, 100); the point itself where there are fewer.
        square: [N, K] squared distances in m^2, ascending, infinite where there are fewer.
    """

    def __init__(self, points: FloatArray) -> None:
        count, most = len(points), min(len(points), NEIGHBORS)
        self.index: IntArray = np.empty((count, most), np.intp)
        self.square: FloatArray = np.empty((count, most))
        tree = cKDTree(points)
        for start in range(0, count, SEARCHED_AT_ONCE):
            rows = np.arange(start, min(start + SEARCHED_AT_ONCE, count))
            self.index[rows], self.square[rows] = _nearest(tree, points, rows, most)

    @property
    def counts(self) -> IntArray:
        """[N] neighbours within the radius, itself among them."""
        counts: IntArray = np.isfinite(self.square).sum(axis=1)
        return counts


def _nearest(
    tree: "cKDTree[None]", points: FloatArray, rows: IntArray, most: int
) -> tuple[IntArray, FloatArray]:
    """Index and square of `Neighbors`, of some rows.

    The tree rounds its distances otherwise and takes any of equal ones: where the last and the next are as good as
    equal, all that are as near compete.
    """
    count = len(points)
    found = tree.query(points[rows], range(1, most + 2), distance_upper_bound=RADIUS_M * SLACK, workers=-1)
    distance, index = found[0], np.where(np.isinf(found[0]), rows[:, None], found[1])
    square = _square(points[index] - points[rows][:, None])
    square[np.isinf(distance) | (square >= RADIUS_M**2)] = np.inf
    order = np.lexsort((np.where(np.isinf(square), count, index), square))
    index, square = np.take_along_axis(index, order, 1), np.take_along_axis(square, order, 1)
    tied = np.isfinite(square[:, most]) & (square[:, most] <= square[:, most - 1] * SLACK)
    for row in np.flatnonzero(tied):
        here = points[rows[row]]
        near = np.array(tree.query_ball_point(here, np.sqrt(square[row, most - 1]) * SLACK))
        squares = _square(points[near] - here)
        order = np.lexsort((near, squares))[:most]
        index[row, :most], square[row, :most] = near[order], squares[order]
    index[np.isinf(square)] = np.broadcast_to(rows[:, None], index.shape)[np.isinf(square)]
    return index[:, :most], square[:, :most]


def _square(offset: FloatArray) -> FloatArray:
    total: FloatArray = offset[..., 0] ** 2 + offset[..., 1] ** 2 + offset[..., 2] ** 2
    return total


def camera_normals(points: FloatArray, neighbors: Neighbors) -> FloatArray:
    """Normals [N, 3] towards the sensor: smallest axes of the covariance of up to 30 neighbours within 0.1 m.

    Offsets are from the neighbour of the lowest index and added up in the order of indices, so that points with the
    same neighbours have the same normal to the bit, and rounding does not decide which of two comes first in a pair.
    """
    count = len(points)
    near = neighbors.index[:, :NORMAL_NEIGHBORS]
    near = np.where(neighbors.square[:, :NORMAL_NEIGHBORS] < NORMAL_RADIUS_M**2, near, count)
    near = np.ascontiguousarray(np.sort(near, axis=1).T)
    used = near < count
    near = np.where(used, near, near[0])
    counts = used.sum(axis=0)
    offsets = [np.where(used, axis[near] - axis[near[0]], 0) for axis in points.T]
    centred = [np.where(used, offset - offset.sum(axis=0) / counts, 0) for offset in offsets]
    # A sum over the first axis takes one row after the other.
    covariance = np.stack([[(a * b).sum(axis=0) for b in centred] for a in centred])
    normals = smallest_axis(covariance)
    normals[counts < LEAST_NEIGHBORS] = (0, 0, 1)
    away = normals[:, 0] * points[:, 0] + normals[:, 1] * points[:, 1] + normals[:, 2] * points[:, 2] > 0
    normals[away] *= -1
    return normals


def smallest_axis(symmetric: FloatArray) -> FloatArray:
    """Unit eigenvectors [N, 3] of the smallest eigenvalues of matrices [3, 3, N], which are overwritten.

    Cyclic Jacobi rotations (Golub, Van Loan, Matrix Computations, section 8.5): t = sgn(theta) / (|theta| +
    sqrt(theta^2 + 1)), theta = (a_qq - a_pp) / (2 a_pq), c = 1 / sqrt(t^2 + 1), s = t c.
    """
    a, axes = symmetric, np.zeros_like(symmetric)
    axes[range(3), range(3)] = 1
    for p, q in SWEEPS * ((0, 1), (0, 2), (1, 2)):
        off, r = a[p, q].copy(), 3 - p - q
        with np.errstate(over="ignore"):  # of axes that are as good as found
            theta = (a[q, q] - a[p, p]) / np.where(off != 0, 2 * off, 1)
            turned = np.copysign(1, theta) / (np.abs(theta) + np.sqrt(theta * theta + 1))
        t = np.where(off != 0, turned, 0)
        c = 1 / np.sqrt(t * t + 1)
        s = t * c
        a[p, p] -= t * off
        a[q, q] += t * off
        a[p, q] = a[q, p] = 0
        a[r, p], a[r, q] = c * a[r, p] - s * a[r, q], s * a[r, p] + c * a[r, q]
        a[p, r], a[q, r] = a[r, p], a[r, q]
        axes[:, p], axes[:, q] = c * axes[:, p] - s * axes[:, q], s * axes[:, p] + c * axes[:, q]
    least = np.argmin(a[range(3), range(3)], axis=0)
    found: FloatArray = np.take_along_axis(axes, least[None, None], axis=1)[:, 0].T.copy()
    return found


def fpfh(points: FloatArray, normals: FloatArray, neighbors: Neighbors) -> FloatArray:
    """FPFH_i = SPFH_i + sum_k SPFH_k / d_ik^2, the sum scaled to 100 in each block of 11 bins: [N, 33].

    A point alone within the radius has zeros.
    """
    simple = spfh(points, normals, neighbors)
    square = neighbors.square[:, 1:]
    inverse = np.zeros_like(square)
    np.divide(1, square, out=inverse, where=(square > 0) & np.isfinite(square))
    count, width = square.shape
    weights = csr_array(
        (inverse.ravel(), neighbors.index[:, 1:].ravel(), np.arange(count + 1) * width), shape=(count, count)
    )
    summed: FloatArray = (weights @ simple).reshape(count, 3, BINS)
    total = summed.sum(axis=2, keepdims=True)
    scaled = np.divide(100 * summed, total, out=np.zeros_like(summed), where=total > 0)
    whole: FloatArray = simple + scaled.reshape(count, WIDTH)
    return whole


def spfh(points: FloatArray, normals: FloatArray, neighbors: Neighbors) -> FloatArray:
    """Histograms of the three angles to each neighbour, 100 in each block of 11 bins: [N, 33]."""
    x, n = points.T.copy(), normals.T.copy()
    out = np.zeros((len(points), WIDTH))
    others = np.maximum(neighbors.counts - 1, 1)
    for start in range(0, len(points), POINTS_AT_ONCE):
        rows = slice(start, start + POINTS_AT_ONCE)
        index = neighbors.index[rows, 1:]
        there = np.isfinite(neighbors.square[rows, 1:])
        here = np.broadcast_to(WIDTH * np.arange(len(index))[:, None], index.shape)[there]
        size = WIDTH * len(index)
        counts = np.zeros(size, np.intp)
        for block, angle in enumerate(_angles(x[:, rows, None], n[:, rows, None], x[:, index], n[:, index])):
            counts += np.bincount(here + (block * BINS + _bin(angle, block)[there]), minlength=size)
        out[rows] = counts.reshape(-1, WIDTH) * (100 / others[rows, None])
    return out


def _angles(
    p1: FloatArray, n1: FloatArray, p2: FloatArray, n2: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """theta = atan2(w.n2, n1.n2), alpha = v.n2, phi = n1.d / |d| of pairs; zeros where a frame has no second axis.

    d = p2 - p1, v = d x n1 normalised, w = n1 x v; both points change places where n2 is nearer to d than n1.
    """
    d = p2 - p1
    length = np.sqrt(_dot(d, d))
    apart = length > 0
    safe = np.where(apart, length, 1)
    first, second = _dot(n1, d) / safe, _dot(n2, d) / safe
    swap = np.abs(first) < np.abs(second)
    phi = np.where(swap, -second, first)
    a, b = np.where(swap, n2, n1), np.where(swap, n1, n2)
    v = _cross(np.where(swap, -d, d), a)
    norm = np.sqrt(_dot(v, v))
    whole = apart & (norm > 0)
    v /= np.where(whole, norm, 1)
    theta = np.arctan2(_dot(_cross(a, v), b), _dot(a, b))
    return np.where(whole, theta, 0), np.where(whole, _dot(v, b), 0), np.where(whole, phi, 0)


def _bin(angle: FloatArray, block: int) -> IntArray:
    """Which of 11 bins: of 2 pi for the first block, of -1..1 for the others."""
    share = (angle + np.pi) / (2 * np.pi) if block == 0 else (angle + 1) * 0.5
    return np.clip(np.floor(BINS * share), 0, BINS - 1).astype(np.intp)


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    total: FloatArray = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return total


def _cross(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def point_histograms(points: npt.NDArray[np.float32], point_pixel: npt.NDArray[np.int32]) -> FloatArray:
    """FPFH [N, 33] of points [N, 3] float32, in metres and in the sensor's frame, with normals towards it.

    The C++ form lies in a room above this one and is asked for by name: where that room is not installed, or there is
    neither its library nor a compiler, NumPy does the work.
    """
    try:
        room = import_module("m3ad_plugins.fpfh")
    except ModuleNotFoundError as error:
        if error.name not in ("m3ad_plugins", "m3ad_plugins.fpfh"):
            raise
        return in_numpy(points)[0]
    histograms: FloatArray = room.fpfh(points, point_pixel)[0]
    return histograms


def in_numpy(
    points: npt.NDArray[np.float32], normals: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Histograms [N, 33] and normals [N, 3], those given or towards the sensor."""
    cloud = points.astype(np.float64)
    neighbors = Neighbors(cloud)
    normals = camera_normals(cloud, neighbors) if normals is None else normals
    return fpfh(cloud, normals, neighbors), normals


def fpfh_cells(
    points: npt.NDArray[np.float32], point_pixel: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """The histograms of a cloud on 28 x 28 cells, pixels without a point zero: [784, 33] float32, row-major.

    3 x 3 means from 224 to 222, then means of the windows that divide 222 by 28.

    Args:
        points: [N, 3] float32, metres, in the sensor's frame.
        point_pixel: [N] int32, row-major pixel of each on the 224 x 224 grid.
    """
    grid = np.zeros((IMAGE_SIZE * IMAGE_SIZE, WIDTH))
    grid[point_pixel] = point_histograms(points, point_pixel)
    pool = cell_pooling()
    down = (pool @ grid.reshape(IMAGE_SIZE, -1)).reshape(CELL_SIDE, IMAGE_SIZE, WIDTH)
    return (pool @ down).reshape(-1, WIDTH).astype(np.float32)


@cache
def cell_pooling() -> FloatArray:
    """AvgPool(3, stride 1) then AdaptiveAvgPool(28) of one axis: [28, 224]."""
    middle = IMAGE_SIZE - 2
    means = np.zeros((middle, IMAGE_SIZE))
    for offset in range(3):
        means[np.arange(middle), np.arange(middle) + offset] = 1 / 3
    cells = np.zeros((CELL_SIDE, middle))
    for cell in range(CELL_SIDE):
        first, last = cell * middle // CELL_SIDE, -(-(cell + 1) * middle // CELL_SIDE)
        cells[cell, first:last] = 1 / (last - first)
    return cells @ means
