"""Fast point feature histograms of a cloud, and their means over the cells of the grid, for banks of geometry.

References:
    FPFH (Rusu et al. 2009), in the form and with the bins of Open3D 0.19, which BTF uses; written anew
    BTF (Horwitz, Hoshen 2023)  https://github.com/eliahuhorwitz/3D-ADS (MIT): radii, neighbours, pooling
Points are [N, 3] float32 in metres; all is computed in float64.
"""

from functools import cache

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
LEAST_NEIGHBORS = 3  # for a covariance; below it a normal is (0, 0, 1), as in Open3D


class Neighbors:
    """The nearest neighbours of every point within RADIUS_M, itself the first: found once for normals and histograms.

    Attributes:
        index: [N, K] into the points, K = min(N, 100); the point itself where there are fewer.
        square: [N, K] squared distances in m^2, ascending, infinite where there are fewer.
    """

    def __init__(self, points: FloatArray) -> None:
        count = min(len(points), NEIGHBORS)
        distance, index = cKDTree(points).query(
            points, range(1, count + 1), distance_upper_bound=RADIUS_M, workers=-1
        )
        missing = np.isinf(distance)
        itself = np.broadcast_to(np.arange(len(points))[:, None], index.shape)
        self.index: IntArray = np.where(missing, itself, index)
        self.square: FloatArray = np.square(distance)

    @property
    def counts(self) -> IntArray:
        """[N] neighbours within the radius, itself among them."""
        counts: IntArray = np.isfinite(self.square).sum(axis=1)
        return counts


def camera_normals(points: FloatArray, neighbors: Neighbors) -> FloatArray:
    """Normals [N, 3] towards the sensor: smallest axes of the covariance of up to 30 neighbours within 0.1 m."""
    near = neighbors.index[:, :NORMAL_NEIGHBORS]
    used = (neighbors.square[:, :NORMAL_NEIGHBORS] < NORMAL_RADIUS_M**2)[..., None]
    counts = used.sum(axis=1)
    offsets = (points[near] - points[:, None]) * used
    centred = (offsets - offsets.sum(axis=1, keepdims=True) / counts[:, None]) * used
    covariance = centred.transpose(0, 2, 1) @ centred
    normals: FloatArray = np.linalg.eigh(covariance)[1][:, :, 0]
    normals[counts[:, 0] < LEAST_NEIGHBORS] = (0, 0, 1)
    away = (normals * points).sum(axis=1) > 0
    normals[away] *= -1
    return normals


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


def fpfh_cells(
    points: npt.NDArray[np.float32], point_pixel: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """The histograms of a cloud on 28 x 28 cells, pixels without a point zero: [784, 33] float32, row-major.

    3 x 3 means from 224 to 222, then means of the windows that divide 222 by 28.

    Args:
        points: [N, 3] float32, metres, in the sensor's frame.
        point_pixel: [N] int32, row-major pixel of each on the 224 x 224 grid.
    """
    cloud = points.astype(np.float64)
    neighbors = Neighbors(cloud)
    grid = np.zeros((IMAGE_SIZE * IMAGE_SIZE, WIDTH))
    grid[point_pixel] = fpfh(cloud, camera_normals(cloud, neighbors), neighbors)
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
