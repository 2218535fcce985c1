"""A procedural category in MVTec 3D-AD layout: moulded plates with ribs and knobs under a structured-light camera.

Good parts differ in pose, proportions, grain, colour and light. Test folders: `good`; `geometry` (dent, bump, crack:
the image does not show them), `colour` (stain, scratch, discolouration: the cloud does not show them) and `both`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from m3ad.bundle import MANIFEST, new_folder, write_json
from PIL import Image
from scipy import ndimage

FORMAT = "m3ad-sample-data"
DEFECT_FOLDERS = ("geometry", "colour", "both")
DISTANCE_M = 0.4
FIELD_MM = 128.0  # width of the field of view at DISTANCE_M
NOISE_MM = 0.2
GEOMETRY_FLOOR_MM = 0.4  # a pixel counts as defective above twice the sensor's noise
COLOUR_FLOOR = 0.15

Array = npt.NDArray[np.float64]
Rng = np.random.Generator
Seat = tuple[float, float]  # x, y in mm
Tint = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Part:
    """A good part on the sensor's grid.

    Args:
        height_mm: [H, W] above the support, 0 outside.
        inside: [H, W].
        colour: [H, W, 3] reflectance in 0..1, support included.
    """

    height_mm: Array
    inside: npt.NDArray[np.bool_]
    colour: Array


@dataclass(frozen=True, slots=True)
class Defect:
    """What a defect adds: millimetres of height, and `tint` mixed in by `alpha`; all on the sensor's grid."""

    height_mm: Array
    alpha: Array
    tint: Tint

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Where the defect can be seen in height or in colour."""
        return (np.abs(self.height_mm) > GEOMETRY_FLOOR_MM) | (self.alpha > COLOUR_FLOOR)


def write_sample_data(
    out: Path, *, seed: int = 0, train: int = 24, validation: int = 8, test_per_kind: int = 6, size: int = 256
) -> None:
    """Write the category to `out`; the same arguments give the same files.

    Args:
        out: new, empty, or an earlier sample category, which is replaced.
        seed: of everything that varies.
        train: good parts to train on.
        validation: good parts to set the threshold with.
        test_per_kind: test parts in each of good, geometry, colour and both.
        size: side of the frames in pixels.

    Raises:
        ArtifactError: `out` holds something else.
        ValueError: a count is below 1, or `size` below 128.
    """
    if min(train, validation, test_per_kind) < 1 or size < 128:
        raise ValueError(
            f"counts must be at least 1 and size at least 128, "
            f"got train {train}, validation {validation}, test_per_kind {test_per_kind}, size {size}"
        )
    counts = {("train", "good"): train, ("validation", "good"): validation}
    counts |= {("test", kind): test_per_kind for kind in ("good", *DEFECT_FOLDERS)}
    with new_folder(out, FORMAT) as folder:
        for group, ((split, kind), count) in enumerate(counts.items()):
            for index in range(count):
                rgb, xyz, mask = sample_frame(np.random.default_rng([seed, group, index]), kind, index, size)
                _write_frame(folder / split / kind, f"{index:03d}", rgb, xyz, mask)
        options = {
            "seed": seed,
            "train": train,
            "validation": validation,
            "test_per_kind": test_per_kind,
            "size": size,
        }
        write_json(folder / MANIFEST, {"format": FORMAT, "options": options})


def sample_frame(
    rng: Rng, kind: str, index: int, size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Make one frame.

    Args:
        rng: source of all variation.
        kind: good, geometry, colour or both.
        index: chooses the defect in turn (dent, bump, crack / stain, scratch, discolouration).
        size: side in pixels.

    Returns:
        rgb [H, W, 3], xyz [H, W, 3] metres with (0, 0, 0) off the part and at holes, mask [H, W].
    """
    part = _part(rng, size)
    # Light, noise and holes are drawn from streams of their own: a defect in one modality never moves the other.
    light, sensor, flaw = rng.spawn(3)
    defect = _defect(flaw, kind, index, part)
    colour = part.colour + defect.alpha[..., None] * (np.array(defect.tint) - part.colour)
    rgb = _photograph(light, colour, part)
    xyz = _scan(sensor, part.height_mm + defect.height_mm, part.inside)
    return rgb, xyz, defect.mask


def _write_frame(folder: Path, name: str, rgb: Any, xyz: Any, mask: Any) -> None:
    for kind in ("rgb", "xyz", "gt"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(folder / "rgb" / f"{name}.png")
    tifffile.imwrite(folder / "xyz" / f"{name}.tiff", xyz, photometric="rgb", compression="zlib")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "gt" / f"{name}.png")


def _grid_mm(size: int) -> tuple[Array, Array]:
    axis = (np.arange(size) + 0.5) / size * FIELD_MM - FIELD_MM / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def _smooth_noise(rng: Rng, size: int, length_mm: float) -> Array:
    """Unit-variance noise with the given correlation length."""
    noise = ndimage.gaussian_filter(rng.normal(size=(size, size)), length_mm * size / FIELD_MM, mode="wrap")
    return np.asarray(noise / noise.std())


def _step(distance_mm: Array, width_mm: float) -> Array:
    """1 inside (negative distance), 0 outside, with a smooth flank of the given width."""
    t = np.clip(0.5 - distance_mm / width_mm, 0, 1)
    return t * t * (3 - 2 * t)


def _box(x: Array, y: Array, half_x: float, half_y: float, radius: float) -> Array:
    """Signed distance to a rounded rectangle, mm."""
    dx, dy = np.abs(x) - half_x + radius, np.abs(y) - half_y + radius
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - radius


def _part(rng: Rng, size: int) -> Part:
    x, y = _grid_mm(size)
    turn = np.deg2rad(rng.normal(0, 2))
    x, y = x - rng.normal(0, 1.5), y - rng.normal(0, 1.5)
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    scale = rng.normal(1, 0.008)
    x, y = x / scale, y / scale

    outline = _box(x, y, 51, 40, 11)
    bore = np.hypot(x, y) - 9  # a through hole in the middle
    inside = (outline < 0) & (bore > 0)
    height = 6 * _step(outline + 2, 4)
    height += 3 * _step(np.abs(outline + 4.5) - 1.8, 1.6)  # rim
    height += 2.5 * _step(np.abs(bore - 3) - 1.6, 1.6)  # collar of the bore
    for rib in (-22.0, 22.0):
        height += 2.2 * _step(_box(x, y - rib, 27, 1.7, 1.5), 1.6)
    knobs = np.full_like(x, np.inf)
    for knob_x in (-37.0, 37.0):
        for knob_y in (-26.0, 26.0):
            knobs = np.minimum(knobs, np.hypot(x - knob_x, y - knob_y) - 5.5)
    height += rng.normal(4, 0.15) * _step(knobs, 2.8)
    height += 0.25 * _smooth_noise(rng, size, 18) + 0.05 * _smooth_noise(rng, size, 0.8)  # warp and grain

    plastic = np.array((0.24, 0.42, 0.47)) * rng.normal(1, 0.015, 3)
    grain = 1 + 0.035 * _smooth_noise(rng, size, 0.7) + 0.03 * _smooth_noise(rng, size, 12)
    flow = 1 + 0.02 * ndimage.gaussian_filter1d(rng.normal(size=(size, size)), 12, axis=1) * 6
    colour = plastic * (grain * flow)[..., None]
    brass = np.array((0.72, 0.56, 0.26)) * rng.normal(1, 0.02, 3)
    print_mark = _step(_box(x + 32, y, 2.2, 9, 0.6), 0.8) + _step(_box(x - 32, y, 2.2, 9, 0.6), 0.8)
    for cover, paint in ((_step(knobs + 1.2, 0.8), brass), (print_mark, np.array((0.85, 0.85, 0.80)))):
        colour += cover[..., None] * (paint * (0.97 + 0.03 * grain[..., None]) - colour)
    belt = 0.09 + 0.012 * _smooth_noise(rng, size, 0.6) + 0.01 * _smooth_noise(rng, size, 6)
    colour = np.where(inside[..., None], colour, belt[..., None] * np.array((1.0, 0.98, 0.95)))
    return Part(np.where(inside, height, 0.0), inside, colour)


def _photograph(rng: Rng, colour: Array, part: Part) -> npt.NDArray[np.uint8]:
    """Lambert and Blinn-Phong under one lamp, with soft contact shadow, exposure, blur and photon noise."""
    pitch = FIELD_MM / len(colour)
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(part.height_mm, 0.7), pitch)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(slope_x)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    lamp = np.array((-0.45, -0.55, 1.0)) + rng.normal(0, 0.03, 3)
    lamp /= np.linalg.norm(lamp)
    half = lamp + np.array((0, 0, 1))
    half /= np.linalg.norm(half)
    diffuse = np.clip(normal @ lamp, 0, None)
    gloss = np.where(part.inside, np.clip(normal @ half, 0, None) ** 40, 0.0)
    wide = ndimage.gaussian_filter(part.inside.astype(float), 4 / pitch)
    occlusion = np.where(part.inside, 1.0, 1 - 0.6 * wide)
    exposure = rng.normal(1.35, 0.04)
    linear = exposure * (colour * ((0.3 + 0.8 * diffuse) * occlusion)[..., None] + 0.10 * gloss[..., None])
    linear = ndimage.gaussian_filter(linear, (0.5, 0.5, 0))
    linear = linear + rng.normal(size=linear.shape) * (0.004 + 0.006 * np.sqrt(np.clip(linear, 0, None)))
    return (np.clip(linear, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


def _scan(rng: Rng, height_mm: Array, inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Range image of a slightly tilted part through a pinhole, with sensor noise; steep flanks and specks are lost."""
    size = len(height_mm)
    pitch = FIELD_MM / size
    x_mm, y_mm = _grid_mm(size)
    tilt_x, tilt_y = np.deg2rad(rng.normal(0, 0.5, 2))
    noise = 0.8 * rng.normal(size=(size, size)) + 0.6 * _smooth_noise(rng, size, 1.5)
    surface = height_mm + np.tan(tilt_x) * x_mm + np.tan(tilt_y) * y_mm + NOISE_MM * noise
    depth = DISTANCE_M * 1000 + rng.normal(0, 0.5) - surface
    slope = np.hypot(*np.gradient(ndimage.gaussian_filter(height_mm, 0.7), pitch))
    lost = (slope > 2.4) | (rng.random((size, size)) < 0.004)
    lost |= ndimage.binary_dilation(rng.random((size, size)) < 0.0002, iterations=2)
    ray = np.stack([x_mm, y_mm, np.full_like(x_mm, DISTANCE_M * 1000)], axis=-1) / (DISTANCE_M * 1000)
    xyz = ray * depth[..., None] / 1000
    return np.where((inside & ~lost)[..., None], xyz, 0.0).astype(np.float32)


def _defect(rng: Rng, kind: str, index: int, part: Part) -> Defect:
    none = np.zeros_like(part.height_mm)
    if kind == "good":
        return Defect(none, none, (0.0, 0.0, 0.0))
    seat = _seat(rng, part)
    if kind == "colour":
        alpha, tint = _colour(rng, part, seat, index)
        return Defect(none, alpha, tint)
    height, shape = _geometry(rng, part, seat, index)
    if kind == "geometry":
        return Defect(height, none, (0.0, 0.0, 0.0))
    # A blow leaves a mark of its own shape: scorched or bare where the surface gave way.
    return Defect(height, 0.75 * shape, ((0.10, 0.07, 0.05), (0.75, 0.72, 0.62))[int(rng.integers(2))])


def _seat(rng: Rng, part: Part) -> Seat:
    """A place on the part, at least 8 mm from its edges, in mm."""
    deep = ndimage.distance_transform_edt(part.inside) * FIELD_MM / len(part.inside) > 8
    row, col = rng.choice(np.argwhere(deep))
    x, y = _grid_mm(len(part.inside))
    return float(x[row, col]), float(y[row, col])


def _blob(rng: Rng, part: Part, seat: Seat, radius_mm: float) -> Array:
    """1 in the middle of an irregular spot, falling smoothly to 0 at about `radius_mm`."""
    x, y = _grid_mm(len(part.inside))
    x, y = x - seat[0], y - seat[1]
    angle = np.arctan2(y, x)
    wobble = 1 + sum(rng.normal(0, 0.12) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    r = np.hypot(x, y) / (radius_mm * np.clip(wobble, 0.6, 1.4))
    return np.where(part.inside & (r < 1), (1 - np.minimum(r, 1) ** 2) ** 1.5, 0.0)


def _stroke(rng: Rng, part: Part, seat: Seat, length_mm: float, width_mm: float) -> Array:
    """1 along a jagged line through `seat`, falling smoothly to 0 at half of `width_mm`."""
    x, y = _grid_mm(len(part.inside))
    angle, knots = rng.uniform(0, 2 * np.pi), 7
    along = np.linspace(-0.5, 0.5, knots) * length_mm
    across = np.cumsum(rng.normal(0, length_mm / 22, knots))
    across -= across[knots // 2]
    px = seat[0] + along * np.cos(angle) - across * np.sin(angle)
    py = seat[1] + along * np.sin(angle) + across * np.cos(angle)
    nearest = np.full_like(x, np.inf)
    for i in range(knots - 1):
        ex, ey = px[i + 1] - px[i], py[i + 1] - py[i]
        t = np.clip(((x - px[i]) * ex + (y - py[i]) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - px[i] - t * ex, y - py[i] - t * ey))
    return np.where(part.inside, np.sqrt(np.clip(1 - (nearest / (width_mm / 2)) ** 2, 0, 1)), 0.0)


def _geometry(rng: Rng, part: Part, seat: Seat, index: int) -> tuple[Array, Array]:
    """Dent, bump, crack in turn: millimetres of height, and the shape (0..1) they come from."""
    if index % 3 == 2:
        shape = _stroke(rng, part, seat, rng.uniform(18, 28), rng.uniform(3, 4))
    else:
        shape = _blob(rng, part, seat, rng.uniform(6.5, 11))
    return (-1, 1, -1)[index % 3] * rng.uniform(2.5, 4) * shape, shape


def _colour(rng: Rng, part: Part, seat: Seat, index: int) -> tuple[Array, Tint]:
    """Stain, scratch, discolouration in turn: how much of which tint covers the part."""
    if index % 3 == 0:
        ragged = 1 + 0.25 * _smooth_noise(rng, len(part.inside), 1.2)
        return np.clip(1.3 * _blob(rng, part, seat, rng.uniform(6, 10)) * ragged, 0, 0.85), (0.13, 0.08, 0.04)
    if index % 3 == 1:
        return 0.9 * _stroke(rng, part, seat, rng.uniform(18, 30), rng.uniform(2.0, 2.8)), (0.86, 0.88, 0.86)
    return np.clip(1.1 * _blob(rng, part, seat, rng.uniform(8, 12)), 0, 0.7), (0.62, 0.44, 0.20)
