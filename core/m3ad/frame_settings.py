"""The choices that turn a frame into tensors, as a bundle fixes them; `preprocess` acts on them."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from m3ad.camera import Camera
from m3ad.contract import PADDED, Geometry
from m3ad.depth_image import NORMAL_SIZES
from m3ad.errors import ArtifactError
from m3ad.holes import ZeroRule
from m3ad.plane import Plane
from m3ad.regions import Regions
from m3ad.scored import Lattice, checked_lattice
from m3ad.typed_json import typed

PlaneRemoval = Literal["none", "fixed", "ransac", "corners"]
Modality = Literal["rgb", "xyz"]

# Settings of bundles that were written before these had a name.
BEFORE = {
    "without": None,
    "hole": None,
    "zero_rule": "any_coordinate",
    "extent_m": None,
    "camera": None,
    "regions": None,
    "lattice": "all",
    "geometry": "points",
    "normal_size": 5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """The choices a bundle fixes; the same choices and the same frame give the same tensors bit for bit.

    Args:
        plane: `none`; `fixed` removes `plane_coefficients`; `ransac` fits each frame's border; `corners` takes three
            corners of an image of the cloud (CRD).
        plane_coefficients: (a, b, c, d) of ax + by + cz + d = 0 in metres, for `fixed` only.
        plane_distance_m: points nearer to the plane are removed (CFM: 5 mm).
        largest_component: after a plane's removal keep only the largest connected piece (CFM's DBSCAN step,
            done on the grid: gaps of up to two pixels are bridged).
        seed: of the RANSAC sampling.
        without: a modality that this line's frames do not have; it is masked out of every frame (`without_modality`).
        hole: a number that stands for `not measured`: a point with a coordinate of this value is a hole.
        zero_rule: `point` makes (0, 0, 0) a hole; `any_coordinate` every point with a zero coordinate (CFM).
        extent_m: how large the training frames' foreground is (`scale.extent`, median); another unit is told by it.
        camera: of depth images that have no camera's file beside them.
        regions: the pixels of a frame that count; None is all of them.
        lattice: which of the pixels that the foreground reaches are scored: `all`, `half` or every k-th in both axes.
        geometry: what the networks see of the cloud; the method's.
        normal_size: of the Sobel operator behind `normals`, 3, 5 or 7 pixels; the larger, the steeper they look (TRD).

    Raises:
        ValueError: a value is out of range, or the coefficients do not go with `plane`.
    """

    plane: PlaneRemoval = "none"
    plane_coefficients: Plane | None = None
    plane_distance_m: float = 0.005
    largest_component: bool = True
    seed: int = 0
    without: Modality | None = None
    hole: float | None = None
    zero_rule: ZeroRule = "point"
    extent_m: float | None = None
    camera: Camera | None = None
    regions: Regions | None = None
    lattice: Lattice = "all"
    geometry: Geometry = "points"
    normal_size: int = 5

    def __post_init__(self) -> None:
        if self.plane not in get_args(PlaneRemoval):
            raise ValueError(f"plane must be one of {', '.join(get_args(PlaneRemoval))}, got {self.plane!r}")
        if (self.plane == "fixed") != (self.plane_coefficients is not None):
            raise ValueError(
                f"plane {self.plane!r} with plane_coefficients {self.plane_coefficients}: "
                "only `fixed` takes them, and needs them"
            )
        c = self.plane_coefficients
        if c is not None and not (len(c) == 4 and all(map(math.isfinite, c)) and any(c[:3])):
            raise ValueError(
                f"plane_coefficients must be four finite numbers with a normal that is not zero, got {c}"
            )
        if not 0 < self.plane_distance_m < math.inf:
            raise ValueError(f"plane_distance_m must be positive, got {self.plane_distance_m}")
        if self.without not in (None, *get_args(Modality)):
            raise ValueError(f"without must be rgb or xyz, got {self.without!r}")
        if self.without == "xyz" and self.plane != "none":
            raise ValueError(
                f"without xyz and plane {self.plane!r}: a cloud that is masked flat has no plane to remove"
            )
        if self.hole is not None and not math.isfinite(self.hole):
            raise ValueError(
                f"hole must be a finite number, got {self.hole}; NaN and infinite are holes anyway"
            )
        if self.zero_rule not in get_args(ZeroRule):
            raise ValueError(
                f"zero_rule must be one of {', '.join(get_args(ZeroRule))}, got {self.zero_rule!r}"
            )
        if self.extent_m is not None and not 0 < self.extent_m < math.inf:
            raise ValueError(f"extent_m must be positive, got {self.extent_m}")
        checked_lattice(self.lattice)
        if self.geometry not in get_args(Geometry):
            raise ValueError(
                f"geometry must be one of {', '.join(get_args(Geometry))}, got {self.geometry!r}"
            )
        if self.geometry in PADDED and self.plane == "corners":
            raise ValueError("plane corners is for methods that see the cloud as an image; use ransac")
        if self.normal_size not in NORMAL_SIZES:
            raise ValueError(f"normal_size must be 3, 5 or 7, got {self.normal_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def to_json(self) -> dict[str, Any]:
        """The choices as they stand in a bundle's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """Read the choices back from a manifest.

        Raises:
            ArtifactError: a key is missing or unknown, or a value is out of range.
        """
        values = {**BEFORE, **values}
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            odd = ", ".join(sorted(values.keys() ^ expected))
            raise ArtifactError(
                f"preprocessing settings do not fit this version of m3ad (missing or unknown: {odd}); "
                "export the bundle again"
            )
        return typed(values, cls, "the record of preprocessing settings", "Export the bundle again")
