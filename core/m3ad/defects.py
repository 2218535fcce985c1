"""Defects of a part: connected regions of the anomaly map above the threshold, in the frame's pixels, metres and mm."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from m3ad.contract import GRID_SIZE, Geometry
from m3ad.grid import to_frame
from m3ad.holes import measured
from m3ad.surface import area_mm2, deviation

Driver = Literal["rgb", "xyz", "mentor"]
HYSTERESIS = (
    0.5  # of the way from the frame's median to the threshold: a region reaches as far as the map is above it
)
LEAST_GRID_PX = (
    9  # of the 224 x 224 grid; a smaller region is noise, unless it alone makes the part defective
)
CORE = 0.7  # of the way from a region's edge to its peak: a height is looked for above it, for a map reaches farther
PAD_GRID_PX = 40  # what `surface` looks at beside a region
MOST_DEFECTS = 64  # the strongest: a frame that is nothing but specks is no list of defects
FAINT = 1e-3  # of the median: a score of zero is no infinite evidence of a good part
EIGHT = np.ones((3, 3), np.bool_)

Map = npt.NDArray[np.float32]
Labels = npt.NDArray[np.signedinteger[Any]]
Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Defect:
    """A region of the anomaly map; what the cloud does not show of it is None.

    Args:
        box_px: left, top, right, bottom in the frame's pixels; right and bottom lie outside.
        centroid_px: x, y, each pixel weighing as much as the map lies above the region's edge.
        area_px: pixels of the frame.
        peak: the map's largest value.
        box_m: least and largest x, y, z in metres.
        centroid_m: x, y, z in metres, of the measured pixels, weighed alike.
        area_mm2: on the surface (`surface.area_mm2`).
        height_mm: largest distance of its core from the surface around, positive towards the sensor
            (`surface.deviation`).
        noise_mm: standard deviation of the points around; a height of a few times this is none.
        shares: of RGB, XYZ and mentor in what lifts the region above the rest of the part, in logarithms.
    """

    box_px: tuple[int, int, int, int]
    centroid_px: tuple[float, float]
    area_px: int
    peak: float
    box_m: tuple[Point, Point] | None
    centroid_m: Point | None
    area_mm2: float | None
    height_mm: float | None
    noise_mm: float | None
    shares: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """The defect as it stands in results, None as null."""
        return asdict(self)


def find_defects(
    anomaly_map: Map,
    threshold: float,
    xyz: npt.NDArray[np.float32],
    score_maps: Map | None = None,
    names: Sequence[str] = (),
    geometry: Geometry = "points",
) -> list[Defect]:
    """The defects of a part whose score lies above the threshold, the strongest first.

    Args:
        anomaly_map: [S, S].
        threshold: of the map.
        xyz: [H, W, 3] metres, its declared holes as (0, 0, 0).
        score_maps: [n, S, S], for the shares.
        names: of the score maps.
        geometry: how the map's grid lies on the frame, see `grid.to_frame`.

    Returns:
        At most 64, at least one unless the map lies nowhere above the threshold.
    """
    if not anomaly_map.max() > threshold:
        return []
    height, width = xyz.shape[:2]
    on_frame = to_frame(anomaly_map, height, width, geometry)
    grid_px = max(height, width) / GRID_SIZE[geometry]
    # Interpolation can lower the peak that made the part defective: it is a defect all the same.
    reached = min(threshold, float(np.nextafter(on_frame.max(), np.float32(-np.inf))))
    labels, regions = _regions(on_frame, reached, grid_px)
    boxes: list[Any] = ndimage.find_objects(labels)
    lifts = {} if score_maps is None else _lifts(score_maps, names, (height, width), geometry)
    return [_measure(n, labels, boxes[n - 1], on_frame, xyz, grid_px, lifts) for n in regions]


def _regions(on_frame: Map, threshold: float, grid_px: float) -> tuple[Labels, list[int]]:
    """Labels of the pixels above the lower level, and the regions that reach the threshold, by their peak."""
    middle = float(np.median(on_frame))
    level = threshold - HYSTERESIS * max(0.0, threshold - middle)
    labels, count = ndimage.label(on_frame > level, EIGHT)
    peaks = np.asarray(ndimage.maximum(on_frame, labels, np.arange(1, count + 1)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = [int(i) for i in np.argsort(-peaks, kind="stable") if peaks[i] > threshold]
    large = [i for i in order if sizes[i] >= LEAST_GRID_PX * grid_px**2] or order[:1]
    return labels, [i + 1 for i in large[:MOST_DEFECTS]]


def _measure(
    number: int,
    labels: Labels,
    box: tuple[slice, slice],
    on_frame: Map,
    xyz: npt.NDArray[np.float32],
    grid_px: float,
    lifts: Mapping[Driver, Map],
) -> Defect:
    """Region `number` of the labels [H, W], looked at with what lies around it."""
    pad = round(PAD_GRID_PX * grid_px)
    vertical, horizontal = box
    top, left = max(0, vertical.start - pad), max(0, horizontal.start - pad)
    around = slice(top, vertical.stop + pad), slice(left, horizontal.stop + pad)
    region, points = labels[around] == number, xyz[around]
    seen = measured(points)
    rows, columns = np.nonzero(region)
    values = on_frame[around][region].astype(np.float64)
    edge, peak = values.min(), values.max()
    weights = values - edge + 1e-9
    core = region & (on_frame[around] >= edge + CORE * (peak - edge))
    height = deviation(points, region, core, seen, labels[around] > 0, grid_px)
    own = points[region & seen].astype(np.float64)
    return Defect(
        box_px=(horizontal.start, vertical.start, horizontal.stop, vertical.stop),
        centroid_px=(
            left + float(np.average(columns, weights=weights)),
            top + float(np.average(rows, weights=weights)),
        ),
        area_px=len(values),
        peak=float(peak),
        box_m=(_point(own.min(axis=0)), _point(own.max(axis=0))) if len(own) else None,
        centroid_m=_point(own.mean(axis=0)) if len(own) else None,
        area_mm2=area_mm2(points, region, seen, grid_px),
        height_mm=height.height_mm if height else None,
        noise_mm=height.noise_mm if height else None,
        shares=_shares({name: lift[around][region] for name, lift in lifts.items()}),
    )


def _point(values: npt.NDArray[np.float64]) -> Point:
    x, y, z = values.tolist()
    return x, y, z


def _lifts(
    score_maps: Map, names: Sequence[str], size: tuple[int, int], geometry: Geometry
) -> dict[Driver, Map]:
    """By modality, how far its scores lie above the frame's median in the logarithm: [H, W] each.

    A map's modality is its name's end, `rgb` or `map_rgb`; terms of several modalities have none. Scores of several
    modalities are multiplied by every method's vote, so their logarithms add.
    """
    found: dict[Driver, Map] = {}
    for name, values in zip(names, score_maps, strict=True):
        driver = next((d for d in get_args(Driver) if name.rpartition("_")[2] == d), None)
        if driver is None or not (values > 0).any():
            continue
        usual = float(np.median(values[values > 0]))
        lift = np.log(np.maximum(values, FAINT * usual) / usual).astype(np.float32)
        on_frame = to_frame(lift, *size, geometry)
        found[driver] = found[driver] + on_frame if driver in found else on_frame
    return found


def _shares(lifts: Mapping[Driver, Map]) -> dict[str, float] | None:
    """Each modality's part of the summed mean lifts, those below zero being none; None where nothing is lifted."""
    means = {name: max(0.0, float(values.mean(dtype=np.float64))) for name, values in lifts.items()}
    total = sum(means.values())
    return {name: mean / total for name, mean in means.items()} if total else None
