"""Good frames -> a trained detector of any method; the encoders stay frozen.

The method fits its networks; preprocessing, features, the verdict threshold from the validation frames and the record
are the same for all. A trained detector can have what other good frames fit anew: `refit`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
from m3ad.contract import PADDED, Geometry
from m3ad.errors import M3adError
from m3ad.frame_settings import Modality, Preprocessing
from m3ad.frames import Sample, read_sample
from m3ad.method import require_lattice
from m3ad.methods import DEFAULT_METHOD, method_named
from m3ad.preprocess import prepare
from m3ad.scale import extent
from m3ad.scored import Lattice

from m3ad_export.detector import Detector
from m3ad_export.method import Fitted, Job
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.nets.efficientnet import EfficientNet
from m3ad_export.nets.point_mae import PointMaeEncoder
from m3ad_export.nets.vit import VisionTransformer
from m3ad_export.nets.wide_resnet import WideResNet
from m3ad_export.saved import save_detector
from m3ad_export.train.features import FeatureExtractor
from m3ad_export.train.samples import Track, require_good, sample_evenly
from m3ad_export.weights import WeightsInfo

MEASURED_FRAMES = 32  # of which the part's extent is taken; the others are held against it


@dataclass(frozen=True, slots=True)
class Encoders:
    """The frozen encoders, in eval mode, and what their weights are; None for a modality that is left out."""

    rgb: VisionTransformer | None = None
    rgb_weights: WeightsInfo | None = None
    xyz: PointMaeEncoder | None = None
    xyz_weights: WeightsInfo | None = None
    teacher: WideResNet | None = None
    teacher_weights: WeightsInfo | None = None
    efficientnet: EfficientNet | None = None
    efficientnet_weights: WeightsInfo | None = None

    def record(self) -> dict[str, Any]:
        """Their entry in a detector's record."""
        pairs = {
            "rgb": (self.rgb, self.rgb_weights),
            "xyz": (self.xyz, self.xyz_weights),
            "teacher": (self.teacher, self.teacher_weights),
            "efficientnet": (self.efficientnet, self.efficientnet_weights),
        }
        return {
            side: {**asdict(encoder.config), "weights": weights.to_json()}
            for side, (encoder, weights) in pairs.items()
            if encoder and weights
        }


def settings_of(method: str, values: dict[str, str] | None = None, start: Any = None) -> Any:
    """A method's training settings.

    Args:
        method: its name.
        values: fields to set, as written on a command line.
        start: what the others are; the method's defaults if left out.

    Raises:
        M3adError: there is no such method or setting, or a value does not fit.
    """
    kind = IMPLEMENTATIONS[method_named(method).name].settings
    known = {field.name: field for field in fields(kind)}
    if odd := sorted(set(values or {}) - known.keys()):
        raise M3adError(f"{method} has no setting {odd[0]!r}, expected one of {', '.join(known)}")
    for name, value in (values or {}).items():
        choices = get_args(get_type_hints(kind)[name])
        if choices and value not in choices:
            raise M3adError(
                f"a setting of {method} does not fit: {name} must be {' or '.join(choices)}, got {value!r}"
            )
    given = asdict(start) if start is not None else {}
    try:
        return msgspec.convert({**given, **(values or {})}, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise M3adError(f"a setting of {method} does not fit: {error}") from error


def train(
    train_samples: Sequence[Sample],
    validation_samples: Sequence[Sample],
    encoders: Encoders,
    folder: Path,
    *,
    category: str,
    preprocessing: Preprocessing,
    settings: Any,
    method: str = DEFAULT_METHOD,
    fitted: Fitted | None = None,
    track: Track = lambda steps, _description, _total: steps,
) -> Detector:
    """Train a method on the good frames of one category.

    Args:
        train_samples: good frames.
        validation_samples: good frames that nothing is trained on; they set the verdict threshold.
        encoders: frozen, those that the method takes.
        folder: gets `features/`, `checkpoints/`, `losses.png` and the detector (`save_detector`).
        category: name of the category.
        preprocessing: of every frame, now and later; `extent_m` is measured on the training frames, `geometry` is the
            method's.
        settings: of the method's own type (`settings_of`).
        method: its name.
        fitted: networks that are trained already, as the authors' own; None to train them here.
        track: shows progress.

    Raises:
        FrameError: a split is empty or holds a defect, or a frame cannot be read.
    """
    implementation = IMPLEMENTATIONS[method]
    require_good("training", train_samples)
    require_good("validation", validation_samples)
    geometry = method_named(method).geometry
    preprocessing = with_extent(train_samples, replace(preprocessing, geometry=geometry))
    extract = FeatureExtractor(
        encoders.rgb, encoders.xyz, preprocessing, folder / "features", encoders.efficientnet
    )
    checkpoints = folder / "checkpoints"
    job = Job(train_samples, extract, checkpoints, settings, track, validation_samples, encoders.teacher)
    ready, fitted = fitted is not None, fitted or implementation.fit(job)
    if fitted.losses:
        save_loss_plot(fitted.losses, folder / "losses.png")
    record = {
        "method": method,
        "category": category,
        "encoders": encoders.record(),
        **fitted.record,
        "preprocessing": preprocessing.to_json(),
        "threshold": {},
        "training": {
            **asdict(settings),
            "train_frames": len(train_samples),
            "validation_frames": len(validation_samples),
            **{f"{stage}_loss": losses[-1] for stage, losses in fitted.losses.items()},
        },
    }
    maps = len(implementation.score_maps(record))
    detector = Detector(
        encoders.rgb, encoders.xyz, fitted.networks, record, maps, encoders.teacher, encoders.efficientnet
    )
    if ready and implementation.refit:
        detector.networks = implementation.refit(detector, job)
    record["threshold"] = find_threshold(detector, validation_samples, extract, track)
    save_detector(detector, folder)
    return detector


def find_threshold(
    detector: Detector, samples: Sequence[Sample], extract: FeatureExtractor, track: Track
) -> dict[str, Any]:
    """The threshold that every validation frame passes, as a record has it."""
    predict = IMPLEMENTATIONS[detector.record["method"]].predictor(detector)
    scores = [float(predict(extract(s))[1]) for s in track(samples, "threshold", len(samples))]
    return {"value": max(scores), "rule": "largest validation score", "validation_scores": scores}


def refit(
    detector: Detector,
    train_samples: Sequence[Sample],
    validation_samples: Sequence[Sample],
    folder: Path,
    *,
    without: Modality | None = None,
    lattice: Lattice | None = None,
    settings: dict[str, str] | None = None,
    track: Track = lambda steps, _description, _total: steps,
) -> Detector:
    """The same encoders and heads with a vote, where there is one, and a threshold from other good frames.

    Args:
        detector: trained; it stays as it is.
        train_samples: good frames.
        validation_samples: good frames; they set the verdict threshold only.
        folder: gets `features/` and the detector.
        without: a modality to mask out of these frames and of every later one; None takes frames as they are.
        lattice: which pixels are scored from now on; the detector's if left out.
        settings: of the method's, to change; the others are as the detector was trained with.
        track: shows progress.

    Raises:
        FrameError: a split is empty or holds a defect, or a frame cannot be read.
        M3adError: `folder` already holds a detector, the detector's plane removal needs the modality, or its method
            scores every pixel.
    """
    require_good("training", train_samples)
    require_good("validation", validation_samples)
    if (folder / "detector.json").exists():
        raise M3adError(f"{folder} holds a detector already; name another folder for the refitted one")
    record = detector.record
    method = record["method"]
    implementation = IMPLEMENTATIONS[method]
    known = {field.name for field in fields(implementation.settings)}
    trained_with = implementation.settings(**{k: v for k, v in record["training"].items() if k in known})
    chosen = settings_of(method, settings, trained_with)
    try:
        preprocessing = replace(detector.preprocessing, without=without)
    except ValueError as error:
        raise M3adError(f"{error}; train a detector with --plane none for this line") from error
    if lattice is not None:
        preprocessing = replace(preprocessing, lattice=lattice)
    require_lattice(detector.contract.method, preprocessing.lattice)
    extract = FeatureExtractor(
        detector.rgb, detector.xyz, preprocessing, folder / "features", detector.efficientnet
    )
    checkpoints = folder / "checkpoints"
    job = Job(train_samples, extract, checkpoints, chosen, track, validation_samples, detector.teacher)
    networks = implementation.refit(detector, job) if implementation.refit else detector.networks
    refitted = replace(
        detector,
        networks=networks,
        record={
            **record,
            "preprocessing": preprocessing.to_json(),
            "training": {**record["training"], **asdict(chosen), "vote_frames": len(train_samples)},
        },
    )
    refitted.record["threshold"] = find_threshold(refitted, validation_samples, extract, track)
    save_detector(refitted, folder)
    return refitted


def with_extent(samples: Sequence[Sample], preprocessing: Preprocessing) -> Preprocessing:
    """The settings with the median extent of the samples' foreground, in metres; histograms are not made for it.

    Raises:
        FrameError: a frame cannot be read or prepared.
    """
    plain: Geometry = "points" if preprocessing.geometry in PADDED else preprocessing.geometry
    settings = replace(preprocessing, extent_m=None, geometry=plain)
    clouds = (
        prepare(read_sample(s, settings.camera), settings).points
        for s in sample_evenly(samples, MEASURED_FRAMES)
    )
    return replace(preprocessing, extent_m=statistics.median(extent(points) for points in clouds))


def save_loss_plot(losses: dict[str, list[float]], path: Path) -> None:
    """One panel per stage, loss against step, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(losses), 3), layout="constrained")
    for axes, (stage, values) in zip(
        figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True
    ):
        axes.plot(range(1, len(values) + 1), values, linewidth=0.8)
        axes.set(title=stage, xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=120)
