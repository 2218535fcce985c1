"""The contract's terms: tensors, sizes, stages and steps, and the table of the custom ops.

Networks, ONNX files, engines, `config.pbtxt`, golden files, the runner and the docs are derived from the declarations
in `m3ad.methods`, which are written in these terms, or checked against them; no other file spells a tensor's shape.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

CONTRACT_VERSION = 4  # raised with every change of a stage's tensors or of the files in a bundle
IMAGE_SIZE = 224
MIN_POINTS = 1024
MAX_POINTS = IMAGE_SIZE * IMAGE_SIZE
MAX_SIDE = 4096  # of a frame
TEXT_BYTES = 2**16  # of a list of defects, at most
MAX_SIZE = 2**20  # of any other dimension: a damaged manifest must not ask for more memory than there is
# The dynamic dimensions: N foreground points, R scored pixels, a frame's height and width.
LETTERS = {
    "N": range(MIN_POINTS, MAX_POINTS + 1),
    "R": range(1, MAX_POINTS + 1),
    "H": range(1, MAX_SIDE + 1),
    "W": range(1, MAX_SIDE + 1),
}

# What a method's networks see of the cloud, and the side of the map that goes with it: the points themselves, their
# histograms (`m3ad.fpfh`), or an image of it, to which the whole frame is stretched. The RGB image is as large as the
# map but for `relief`.
Geometry = Literal["points", "fpfh", "depth", "normals", "relief"]
GRID_SIZE: dict[Geometry, int] = {
    "points": IMAGE_SIZE,
    "fpfh": IMAGE_SIZE,
    "depth": 256,
    "normals": 256,
    "relief": 192,
}
PADDED: tuple[Geometry, ...] = ("points", "fpfh")  # the frame is padded to a square, not stretched
RGB_SIZE: dict[Geometry, int] = {**GRID_SIZE, "relief": 768}

Layout = Literal["chain", "fused"]
LAYOUTS: tuple[Layout, ...] = ("chain", "fused")  # the one to read and to debug, the one to ship


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the contract; a dimension is a number or a letter of LETTERS.

    `values` is what its values must be besides: `finite`, or `pixels` of the grid, each at most once and ascending.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: Literal["float32", "int32", "uint8", "uint16", "bool", "object"] = (
        "float32"  # object: texts, as bytes
    )
    unit: str = ""
    values: Literal["any", "finite", "pixels"] = "any"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with -1 for the dynamic dimensions."""
        return tuple(-1 if isinstance(d, str) else d for d in self.dims)

    def largest_bytes(self) -> int:
        """Bytes of the largest array that fits."""
        size = TEXT_BYTES if self.dtype == "object" else np.dtype(self.dtype).itemsize
        return size * math.prod(LETTERS[d][-1] if isinstance(d, str) else d for d in self.dims)

    def mismatch(self, array: np.ndarray[Any, Any]) -> str | None:
        """Say in a few words how `array` differs from this tensor, or None when it fits."""
        fits = array.ndim == len(self.dims) and all(
            got in LETTERS[want] if isinstance(want, str) else want == got
            for want, got in zip(self.dims, array.shape, strict=True)
        )
        if fits and array.dtype == self.dtype:
            return self._wrong_values(array)
        dims = ", ".join(str(d) for d in self.dims)
        sizes = "".join(
            f", {d} in {LETTERS[d].start}..{LETTERS[d][-1]}" for d in self.dims if isinstance(d, str)
        )
        return f"`{self.name}` is {array.dtype} {list(array.shape)}, expected {self.dtype} [{dims}]{sizes}"

    def _wrong_values(self, array: np.ndarray[Any, Any]) -> str | None:
        if self.values == "finite" and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            return f"`{self.name}` holds {bad} values that are NaN or infinite, expected finite ones"
        if self.values == "pixels" and len(array):
            if array.min() < 0 or array.max() >= MAX_POINTS:
                return f"`{self.name}` holds {array.min()}..{array.max()}, expected pixels in 0..{MAX_POINTS - 1}"
            if (wrong := array[1:] <= array[:-1]).any():
                first, second = array[wrong.argmax() :][:2]
                return f"`{self.name}` holds {second} after {first}, expected each pixel once, in ascending order"
        return None


def mismatch(tensors: Iterable[Tensor], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str | None:
    """Say in a few words how the arrays differ from the tensors, or None when they fit and agree in their letters."""
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in tensors:
        if tensor.name not in arrays:
            return f"`{tensor.name}` is needed, it was not given"
        if problem := tensor.mismatch(arrays[tensor.name]):
            return problem
        for letter, size in zip(tensor.dims, arrays[tensor.name].shape, strict=True):
            if isinstance(letter, str):
                first, name = sizes.setdefault(letter, (size, tensor.name))
                if first != size:
                    unit = {"H": "rows of pixels", "W": "columns of pixels"}.get(letter, "rows")
                    return (
                        f"`{tensor.name}` has {size} {unit} but `{name}` {first}, expected as many ({letter})"
                    )
    return None


@dataclass(frozen=True, slots=True)
class Stage:
    """A model of the chain: its name and the tensors that go in and come out, in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One use of a stage in a layout: stage tensor name -> name of the value in the pipeline."""

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """The sizes a bundle fixes, and where sampling may not start; everything else in the contract follows.

    A size of which a method has no tensor keeps its default.
    `min_norm_sq` is FarthestPointSample's: positive, it keeps points this near to the origin from being sampled.
    """

    rgb_tokens: int = 784  # 28 x 28 for DINO ViT-B/8, row-major
    rgb_width: int = 768
    groups: int = 1024
    group_size: int = 32
    xyz_width: int = 1152
    mentor_width: int = 256
    score_maps: int = 7  # rgb, xyz, mentor and each voting term
    min_norm_sq: float = 0.0

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in asdict(self).items() if name != "min_norm_sq"}
        if odd := [name for name, value in sizes.items() if not 1 <= value <= MAX_SIZE]:
            raise ValueError(f"{odd[0]} must lie in 1..{MAX_SIZE}, got {sizes[odd[0]]}")
        if not 0 <= self.min_norm_sq < math.inf:
            raise ValueError(f"min_norm_sq must be a number from 0 on, got {self.min_norm_sq}")
        side = math.isqrt(self.rgb_tokens)
        if side * side != self.rgb_tokens:
            raise ValueError(f"rgb_tokens must be a square number, got {self.rgb_tokens}")
        if not 1 <= self.group_size <= MIN_POINTS or not 1 <= self.groups <= MIN_POINTS:
            raise ValueError(
                f"groups and group_size must lie in 1..{MIN_POINTS}, got {self.groups} and {self.group_size}"
            )

    @property
    def rgb_side(self) -> int:
        """Tokens along one side of the image."""
        return math.isqrt(self.rgb_tokens)

    def to_json(self) -> dict[str, float]:
        """The sizes as they stand in a bundle's manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Op:
    """A custom op of ONNX domain `m3ad`; `version` is its plugin's and rises when its tensors change."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    version: int = 1


OP_DOMAIN = "m3ad"
OP_VERSION = 2  # of the domain: the highest version of an op in it
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "FarthestPointSample",
            ("points", "point_pixel"),
            ("idx",),
            {"num_samples": int, "min_norm_sq": float},
            version=2,
        ),
        Op("KnnGroup", ("points", "idx"), ("neighborhood", "knn_idx"), {"group_size": int}),
        Op(
            "TokenInterpolate",
            ("points", "point_pixel", "centers", "tokens", "scored_pixel"),
            ("rows",),
            {"image_size": int, "output_size": int},
            version=2,
        ),
        Op(
            "OneClassSvm",
            ("x", "support_vectors", "coefficients", "rho"),
            ("decision",),
            {"kernel": str, "gamma": float},
        ),
        Op("NearestRow", ("x", "bank"), ("distance", "idx"), {}),
    )
}
