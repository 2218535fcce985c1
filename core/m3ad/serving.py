"""What a deployment tells its clients: the record of the served bundle, JSON in the ensemble's parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3ad.bundle import Bundle
from m3ad.camera import Camera
from m3ad.contract import Dims, Layout
from m3ad.errors import ArtifactError
from m3ad.frame_door import DepthType
from m3ad.frame_settings import Preprocessing
from m3ad.limits import Limits
from m3ad.manifest import Encoder, OfficialWeights
from m3ad.method import Contract
from m3ad.methods import METHODS, contract_of
from m3ad.typed_json import parse_json, require_whole, typed

# Parameters of a served ensemble: the ServingRecord as JSON, and how it is served (runtime, precision, model_bytes).
RECORD_PARAMETER, SERVING_PARAMETER = "m3ad", "m3ad_serving"
SHARED = "shared_"  # what the name of a stage's model begins with when several categories share it

# What Triton takes as a model's name, and what needs no quoting on any command line.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def require_model_name(category: str, advice: str) -> None:
    """Check that a category can name a Triton model.

    Raises:
        ArtifactError: it cannot; the message ends in the advice.
    """
    if not MODEL_NAME.fullmatch(category):
        raise ArtifactError(
            f"category {category!r} cannot name a Triton model; expected ASCII letters and digits, '_', '-' and '.', a "
            f"letter or digit first: {advice}"
        )


def stage_named(model: str, category: str) -> str:
    """The stage that a served model of a category stands for: `<category>_<stage>` or `shared_<stage>`, then `.N`."""
    own = f"{category}_"
    prefix = own if model.startswith(own) else SHARED
    return model.removeprefix(prefix).partition(".")[0]


@dataclass(frozen=True, slots=True)
class DepthInput:
    """The depth images that a door takes instead of clouds: their type, and the camera that both pictures are of."""

    dtype: DepthType
    camera: Camera


@dataclass(frozen=True, slots=True)
class ServingRecord:
    """What a client must know of a bundle to prepare frames and give verdicts; it travels with every deployment.

    `depth` is None where the door for frames takes clouds.
    """

    contract_version: int
    method: str
    category: str
    layout: Layout
    dims: Dims
    preprocessing: dict[str, Any]
    threshold: float
    weights: str
    score_maps: list[str]
    review: float | None = None
    depth: DepthInput | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.layout not in METHODS[self.method].layouts:
            raise ValueError(f"{self.method} has no layout {self.layout!r}")
        Limits(self.threshold, self.review)

    @classmethod
    def of(cls, bundle: Bundle, layout: Layout, depth: DepthInput | None = None) -> "ServingRecord":
        """The record of a bundle served in this layout, for depth images where `depth` is given."""
        manifest = bundle.manifest
        return cls(
            contract_version=manifest.contract_version,
            method=manifest.method,
            category=manifest.category,
            layout=layout,
            dims=manifest.dims,
            preprocessing=manifest.preprocessing,
            threshold=manifest.threshold.value,
            weights=weights_line(manifest.encoders, manifest.official),
            score_maps=manifest.score_maps,
            review=manifest.threshold.review,
            depth=depth,
        )

    @property
    def limits(self) -> Limits:
        """What the scores are held against, unless a request has its own."""
        return Limits(self.threshold, self.review)

    @property
    def depth_type(self) -> DepthType | None:
        """Of the depth images that the door for frames takes; None where it takes clouds."""
        return self.depth.dtype if self.depth else None

    @property
    def contract(self) -> Contract:
        """What crosses the stage boundaries of the served detector."""
        return contract_of(self.method, self.dims, Preprocessing.from_json(self.preprocessing).lattice)

    @classmethod
    def from_json(cls, text: str | bytes, source: str, advice: str) -> "ServingRecord":
        """Read a record back from an ensemble's parameter, every field checked.

        Raises:
            ArtifactError: it is not JSON, or a field is missing, of another type or out of range.
        """
        document = parse_json(text, source, advice)
        record = typed(document, cls, source, advice)
        require_whole(document["dims"], record.dims.to_json(), "$.dims", source, advice)
        return record


def weights_line(
    encoders: Mapping[str, Encoder], official: Mapping[str, OfficialWeights] | None = None
) -> str:
    """Which weights a result comes from, in one line, shown wherever a result is shown."""
    parts = [f"{side} {encoder.name} ({encoder.weights.kind} weights)" for side, encoder in encoders.items()]
    parts += [f"{part} {file.name} (licence: {file.licence})" for part, file in (official or {}).items()]
    return "; ".join(parts)
