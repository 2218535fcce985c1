"""A method that lives in the tests only: how far a pixel's RGB feature lies from the mean of good frames, unsmoothed.

Its declaration and its implementation, which otherwise are a file each; `register` is the two lines in the dicts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from m3ad.contract import Dims, Stage
from m3ad.method import CpuForm, DenseGraph, Method, Use
from m3ad.methods import METHODS, common
from torch import Tensor, nn


def stages(dims: Dims) -> dict[str, Stage]:
    """image -> rgb_tokens -> rgb_features -> map."""
    tokens, features = common.rgb_tokens(dims), common.rows("rgb_features", dims.rgb_width)
    verdict = common.verdict(dims, "distance from the mean feature", "the same")
    table = (
        common.rgb_extractor(dims),
        Stage("project", (tokens, common.SCORED_PIXEL), (features,)),
        Stage("distance", (features, common.SCORED_PIXEL), verdict),
    )
    return {stage.name: stage for stage in table}


METHOD = Method(
    name="mean_colour",
    title="Distance from the mean",
    inputs=("image", "scored_pixel"),
    stages=stages,
    layouts={"chain": (Use("rgb_extractor"), Use("project"), Use("distance"))},
    cpu={
        "rgb_extractor": common.RGB_CPU,
        "project": common.PROJECT_CPU,
        "distance": CpuForm("graph", ("distance.onnx",)),
    },
    graphs=(common.RGB_GRAPH, DenseGraph("distance", ("chain",), "map")),
    score_maps=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How many rows the mean is of."""

    seed: int = 0
    rows: int = 1000


class Distance(nn.Module):
    """rgb_features [R, D], scored_pixel [R] -> anomaly_map [224, 224], score [1], score_maps [1, 224, 224]."""

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, features: Tensor, scored_pixel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance = torch.linalg.vector_norm(features - self.mean, dim=1)
        flat = torch.zeros(224 * 224).scatter(0, scored_pixel.long(), distance)
        anomaly_map = flat.reshape(224, 224)
        return anomaly_map, flat.amax(dim=0, keepdim=True), anomaly_map[None]


def implementation() -> Any:
    """The half that needs torch and the exporter."""
    from m3ad_export.dense.encoders import dense_rgb
    from m3ad_export.dense.torch_ops import scored_pixels
    from m3ad_export.detector import Detector
    from m3ad_export.method import Fitted, Form, Implementation, Job, Networks

    def fit(job: Job) -> Fitted:
        assert job.extract.rgb
        network = Distance(job.extract.rgb.config.token_width)
        rows = [job.extract(sample) for sample in job.track(job.samples, "mean", len(job.samples))]
        applied = [torch.from_numpy(f.rgb_operator.apply(f.rgb_tokens)) for f in rows]
        network.mean = torch.cat(applied)[:: max(1, sum(map(len, applied)) // job.settings.rows)].mean(dim=0)
        return Fitted({"distance": network.eval()}, {"heads": {"width": len(network.mean)}}, {})

    def build(record: Mapping[str, Any]) -> Networks:
        return {"distance": Distance(**record["heads"])}

    def predictor(detector: Detector) -> Any:
        def predict(frame: Any) -> tuple[Tensor, Tensor]:
            features = torch.from_numpy(frame.rgb_operator.apply(frame.rgb_tokens))
            found: tuple[Tensor, Tensor] = detector.networks["distance"](
                features, torch.from_numpy(frame.scored_pixel)
            )[:2]
            return found

        return predict

    def dense(detector: Detector) -> Form:
        def run(image: Tensor, _points: Tensor, point_pixel: Tensor) -> Tensor:
            pixel = scored_pixels(point_pixel)
            found: Tensor = detector.networks["distance"](dense_rgb(detector, image)[pixel], pixel)[0]
            return found

        return run

    return Implementation(
        settings=Settings,
        fit=fit,
        build=build,
        graphs=lambda detector: detector.networks,
        predictor=predictor,
        score_maps=lambda _record: ("distance",),
        dense=dense,
    )


def register() -> None:
    """List the declaration, as one line in `m3ad.methods` would."""
    METHODS[METHOD.name] = METHOD
