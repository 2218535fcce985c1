"""The bundle's manifest as a typed value: each field is checked when it is read, so that no reader has to."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from m3ad.contract import Dims, Layout
from m3ad.limits import Limits
from m3ad.methods import METHODS

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0)]
Json = dict[str, Any]  # recorded for people; nothing reads a value out of it

CATEGORY = re.compile(r"[^/\\\x00-\x1f]+")


class FileEntry(Struct, frozen=True):
    """What a manifest records of one file."""

    sha256: Sha256
    bytes: Count


class Weights(Struct, frozen=True):
    """Where an encoder's weights come from."""

    kind: str


class Encoder(Struct, frozen=True):
    """An encoder by name; its sizes stand beside, for whoever builds the network."""

    name: str
    weights: Weights


class OfficialWeights(Struct, frozen=True):
    """A file of the authors that the heads were taken from, and what it may be used for."""

    name: str
    licence: str


class Threshold(Struct, frozen=True):
    """A part is anomalous when its score lies above `value`, and looked at when it lies above `review`."""

    value: float
    review: float | None = None

    def __post_init__(self) -> None:
        Limits(self.value, self.review)

    @property
    def limits(self) -> Limits:
        """What scores are held against."""
        return Limits(self.value, self.review)


class Voting(Struct, frozen=True):
    """The voting terms' exponents of RGB, XYZ and mentor scores, and what the one-class SVM looks at."""

    exponents: list[tuple[float, float, float]]
    svm_input: Literal["product", "terms"]


class Precision(Struct, frozen=True):
    """What a quantized bundle's graphs hold, and what they were made from."""

    type: str
    half: Literal["fp16", "bf16"] | None
    source_onnx: Sha256


class LatticeChange(Struct, frozen=True):
    """What a bundle whose lattice was changed was made from, and whether a second pass gives the source's score."""

    source_onnx: Sha256
    refine: bool = False


class AcceptedLoss(Struct, frozen=True):
    """Who took a bundle that did not pass its gate, and why."""

    by: str
    reason: str


class Gate(Struct, frozen=True):
    """Whether the metrics of a bundle of another precision or lattice hold against its source's."""

    passed: bool
    accepted: AcceptedLoss | None = None


class Manifest(Struct, frozen=True, kw_only=True):
    """What `m3ad-export bundle` says of a bundle.

    Attributes:
        method: the detector's, one of `m3ad.methods.METHODS`.
        layouts: which wirings the bundle has graphs for.
        score_maps: the names of the score maps, as many as `dims.score_maps`.
        official: the authors' files that the heads come from, by part; none where they were trained here.
        preprocessing: as `Preprocessing.from_json` reads it.
        files: every file of the bundle but the manifest and the engines, by relative path.
        lattice: where the lattice of the preprocessing is another than the detector was trained with.
        rig: as `Rig.from_json` reads it.
        refit, promoted: which reviewed parts it was refitted to, what that changed, and by whose word it is used.
        reference: how the calibration frames look, as `Reference.from_json` reads it.
    """

    contract_version: int
    method: str
    category: str
    dims: Dims
    layouts: Annotated[list[Layout], Meta(min_length=1)]
    score_maps: list[str]
    encoders: dict[str, Encoder]
    preprocessing: Json
    threshold: Threshold
    files: dict[str, FileEntry]
    official: dict[str, OfficialWeights] = {}
    voting: Voting | None = None
    precision: Precision | None = None
    lattice: LatticeChange | None = None
    gate: Gate | None = None
    rig: Json | None = None
    reference: Json | None = None
    parity: Json | None = None
    svm: Json | None = None
    refit: Json | None = None
    promoted: Json | None = None
    export_s: float = 0.0

    def __post_init__(self) -> None:
        if not CATEGORY.fullmatch(self.category):
            raise ValueError(f"category {self.category!r} is not a name")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        if len(set(self.layouts)) != len(self.layouts) or not set(self.layouts) <= method.layouts.keys():
            raise ValueError(
                f"layouts {self.layouts}: expected some of {', '.join(method.layouts)}, each once"
            )
        if method.score_maps not in (None, self.dims.score_maps):
            raise ValueError(f"{self.method} has {method.score_maps} score_maps, dims {self.dims.score_maps}")
        if len(self.score_maps) != self.dims.score_maps:
            raise ValueError(f"{len(self.score_maps)} score_maps are named, dims has {self.dims.score_maps}")
        if not self.files:
            raise ValueError("files lists nothing, so nothing of the bundle can be verified")
        if outside := [path for path in self.files if not is_inside(path)]:
            raise ValueError(f"files lists {outside[0]!r}, which is not a path inside the bundle")


def is_inside(relative: str) -> bool:
    """True for a plain relative path that cannot leave its folder: no `..`, no root, no backslash, nothing empty."""
    path = PurePosixPath(relative)
    plain = path.as_posix() == relative and relative not in ("", ".")
    return plain and not path.is_absolute() and ".." not in path.parts and not set("\\\0") & set(relative)
