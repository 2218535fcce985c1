"""What an organised cloud says of a region: its area, and how far it stands out of the surface around it.

Millimetres and square millimetres out of metres; the sensor is the cloud's origin, as depth cameras have it.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

REACH_PX = 2  # slopes are fitted over 5 x 5 pixels
MEAN_REACH = 12  # of the grid's pixels to each side: what is smaller is a flank, what is larger a surface
LEAST_SEEN = 8  # of those 25, for a slope
STEP = 5.0  # a pixel this many times as large as the region's median spans a step in depth, not a surface
MARGIN = 3.0  # of the grid's pixels: how far beside the region the defect may still reach
LEAST_AROUND = 60  # points for a fit of six coefficients that outliers do not decide
MOST_AROUND = 1024
CANDIDATES, NEAR = 64, 5.0  # planes that are tried, and how many medians from the best one a point may lie
FITS = 12  # the weights settle after a few
LEAST_NOISE_MM = 1e-3
TUKEY = 4.685  # the biweight's constant: 95 % of least squares' efficiency on Gaussian noise
WINDOWS_PX, WIDEST = (1, 3, 5, 9, 15), 5.0  # the widest in pixels of the grid
FLOOR_MM = 0.05  # noise of a height below which nothing is gained by averaging

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Deviation(NamedTuple):
    """How a region lies to the surface around it.

    Args:
        height_mm: the largest distance from that surface, positive towards the sensor.
        noise_mm: standard deviation of the points around, from their median absolute distance to it.
    """

    height_mm: float
    noise_mm: float


def area_mm2(xyz: npt.NDArray[np.float32], region: Mask, seen: Mask, grid_px: float) -> float | None:
    """Area of a region on the surface it lies on: sum_i N_i . n_i in mm^2, N = dp/du x dp/dv, n its mean direction.

    The slopes dp/du and dp/dv are fitted by least squares over 5 x 5 pixels. The mean is taken over 1/9 of the frame,
    so that neither the sensor's noise nor the flanks of a dent count as surface. A pixel that was not measured, or that
    spans a step in depth, counts as the region's median pixel.

    Args:
        xyz: [H, W, 3] metres.
        region: [H, W].
        seen: [H, W] where xyz was measured.
        grid_px: pixels of the frame to one of the 224 x 224 grid.

    Returns:
        None where no pixel of the region has a slope.
    """
    reach = max(1, round(MEAN_REACH * grid_px))
    crop = _crop(region, reach + REACH_PX)
    vectors = _vectors_mm2(xyz[crop], seen[crop])
    mean = ndimage.uniform_filter(np.nan_to_num(vectors), (2 * reach + 1, 2 * reach + 1, 0))
    chosen = region[crop]
    mean = mean[chosen]
    direction = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    elements = (vectors[chosen] * direction).sum(axis=-1)
    usual = np.nanmedian(elements) if np.isfinite(elements).any() else np.nan
    if not usual > 0:
        return None
    elements[~(np.abs(elements) <= STEP * usual)] = usual
    return float(elements.sum())


def deviation(
    xyz: npt.NDArray[np.float32], region: Mask, core: Mask, seen: Mask, others: Mask, grid_px: float
) -> Deviation | None:
    """Largest distance of a region's core from the surface around the region.

    h(s, t) = a + b s + c t + d s^2 + e s t + f t^2 along the normal of the points around, fitted to them by iterated
    reweighting with Tukey's biweight (Holland and Welsch 1977) from a least median of squares plane on. Distances are
    averaged over the smallest window whose noise is a small part of the result, and the pixels within a tenth of the
    largest one are averaged again: the largest of many noisy values lies too high.

    Args:
        xyz: [H, W, 3] metres.
        region: [H, W], the defect; what lies beside it is the surface.
        core: [H, W], where in it the largest distance is looked for.
        seen: [H, W] where xyz was measured.
        others: [H, W] all defects of the frame; none of them belongs to a surface around.
        grid_px: pixels of the frame to one of the 224 x 224 grid.

    Returns:
        None where too little was measured of the core or around the region.
    """
    margin_px = MARGIN * grid_px
    radius = math.sqrt(np.count_nonzero(region) / math.pi)
    width = min(max(radius, 4 * margin_px), 12 * margin_px)
    crop = _crop(region, math.ceil(margin_px + width))
    off = ndimage.distance_transform_edt(~region[crop])
    inside = seen[crop] & core[crop]
    beside = seen[crop] & (off > margin_px) & (off <= margin_px + width)
    beside &= ~ndimage.binary_dilation(others[crop], iterations=max(1, round(margin_px)))
    around = np.flatnonzero(beside)
    if len(around) < LEAST_AROUND or not inside.any():
        return None
    points = xyz[crop].astype(np.float64) * 1e3
    chosen = points.reshape(-1, 3)[around[:: -(-len(around) // MOST_AROUND)]]
    distances, noise = _distances(points, chosen)
    best = 0.0
    for window in (w for w in WINDOWS_PX if w <= WIDEST * max(1.0, grid_px)):
        weight = ndimage.uniform_filter(seen[crop].astype(np.float64), window, mode="constant")
        mean = ndimage.uniform_filter(np.where(seen[crop], distances, 0.0), window, mode="constant")
        averaged = np.where(inside, mean / np.maximum(weight, 1e-9), 0.0)
        extreme = averaged.flat[np.abs(averaged).argmax()]
        best = float(averaged[averaged / extreme > 0.9].mean()) if extreme else 0.0
        if 3 * noise / window <= max(0.05 * abs(best), FLOOR_MM):
            break
    return Deviation(best, noise)


def _crop(region: Mask, margin_px: int) -> tuple[slice, slice]:
    """The region's box with a margin."""
    (rows, columns) = ndimage.find_objects(region.astype(np.int8))[0]
    return (
        slice(max(0, rows.start - margin_px), rows.stop + margin_px),
        slice(max(0, columns.start - margin_px), columns.stop + margin_px),
    )


def _vectors_mm2(xyz: npt.NDArray[np.float32], seen: Mask) -> Floats:
    """dp/du x dp/dv of each pixel [h, w, 3] in mm^2, NaN where too few neighbours were measured."""
    offsets = np.arange(-REACH_PX, REACH_PX + 1, dtype=np.float64)
    powers = [np.ones_like(offsets), offsets, offsets**2]

    def moment(values: Floats, in_v: int, in_u: int) -> Floats:
        along = ndimage.correlate1d(values, powers[in_u], axis=1, mode="constant")
        return np.asarray(ndimage.correlate1d(along, powers[in_v], axis=0, mode="constant"))

    weight = seen.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        count, u, v = moment(weight, 0, 0), moment(weight, 0, 1), moment(weight, 1, 0)
        uu = moment(weight, 0, 2) - u * u / count
        vv = moment(weight, 2, 0) - v * v / count
        uv = moment(weight, 1, 1) - u * v / count
        determinant = uu * vv - uv * uv
        slopes_u, slopes_v = [], []
        for axis in range(3):
            value = np.where(seen, xyz[..., axis], 0).astype(np.float64) * 1e3
            total = moment(value, 0, 0)
            up = moment(value, 0, 1) - u * total / count
            vp = moment(value, 1, 0) - v * total / count
            slopes_u.append((vv * up - uv * vp) / determinant)
            slopes_v.append((uu * vp - uv * up) / determinant)
        cross = np.cross(np.stack(slopes_u, axis=-1), np.stack(slopes_v, axis=-1))
    usable = seen & (count > LEAST_SEEN - 0.5) & (determinant > 0.5)
    return np.where(usable[..., None], cross, np.nan)


def _distances(points: Floats, around: Floats) -> tuple[Floats, float]:
    """Distance of each point [h, w, 3] from the surface through `around` [M, 3], and the noise of those; in mm."""
    weight = _near_a_plane(around)
    for _ in range(FITS):
        middle = np.average(around, axis=0, weights=weight)
        centred = around - middle
        axes = np.linalg.eigh((centred * weight[:, None]).T @ centred)[1]
        normal = axes[:, 0] if axes[:, 0] @ middle < 0 else -axes[:, 0]  # towards the sensor
        tangents = axes[:, 1:]
        unit = np.abs(centred).max()
        terms = _terms(centred @ tangents / unit)
        weighted, height = terms * weight[:, None], centred @ normal
        coefficients = np.linalg.lstsq(weighted.T @ terms, weighted.T @ height, rcond=None)[0]
        residual = height - terms @ coefficients
        scale = max(1.4826 * float(np.median(np.abs(residual))), LEAST_NOISE_MM)
        weight = np.square(np.maximum(0, 1 - np.square(residual / (TUKEY * scale))))
    offset = points - middle
    return offset @ normal - _terms(offset @ tangents / unit) @ coefficients, scale


def _near_a_plane(points: Floats) -> Floats:
    """1 for points [M, 3] near the plane from which half of them lie least far (least median of squares), else 0.

    Up to half of them may be something else, such as what lies behind the part's edge.
    """
    picks = np.random.default_rng(0).integers(len(points), size=(CANDIDATES, 3))
    a, b, c = points[picks].swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    off = np.abs(points @ normals.T - np.einsum("kd,kd->k", normals, a))
    half = np.median(off, axis=0)
    half[~normals.any(axis=1)] = np.inf
    best = int(half.argmin())
    return np.asarray(off[:, best] <= max(NEAR * half[best], LEAST_NOISE_MM), np.float64)


def _terms(at: Floats) -> Floats:
    """1, s, t, s^2, s t, t^2 of [..., 2]."""
    s, t = at[..., 0], at[..., 1]
    return np.stack([np.ones_like(s), s, t, s * s, s * t, t * t], axis=-1)
