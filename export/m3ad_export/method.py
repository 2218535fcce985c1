"""A method in PyTorch, as its file in `methods/` declares it: what is trained, exported and compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.frames import Sample
from torch import Tensor, nn

from m3ad_export.detector import Detector
from m3ad_export.heads.tiled import FusedHead
from m3ad_export.heads.voting import OneClassSvm, SvmRows
from m3ad_export.nets.wide_resnet import WideResNet
from m3ad_export.train.features import FeatureExtractor, FrameFeatures
from m3ad_export.train.samples import Track
from m3ad_export.weights import WeightsInfo

# A method that sees an image of the cloud is given it in place of the points (`ModelInput.cloud`).
Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # image, points, point_pixel -> anomaly map
Networks = dict[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Job:
    """What a method is fitted to.

    Attributes:
        samples: good training frames.
        extract: gives their features.
        folder: for checkpoints; a run that was interrupted goes on from them.
        settings: of the method's own type.
        track: shows progress.
        validation: good frames that are not trained on.
        teacher: frozen, where the method takes one.
    """

    samples: Sequence[Sample]
    extract: FeatureExtractor
    folder: Path
    settings: Any
    track: Track
    validation: Sequence[Sample]
    teacher: WideResNet | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What training leaves.

    Attributes:
        networks: in eval mode, by the names they are saved under.
        record: what builds them again (`Implementation.build`), and whatever people should know; JSON-able.
        losses: of every step, by stage of the training.
    """

    networks: Networks
    record: dict[str, Any]
    losses: dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """A method in PyTorch.

    Attributes:
        settings: the dataclass of its training's settings; `m3ad-export train --set NAME=VALUE` sets its fields.
        fit: trains or fills the networks.
        build: a detector's record -> its networks, untrained.
        graphs: the dense parts of the chain's stages by the names of the contract's graphs, encoders left out.
        predictor: a detector -> a function from a frame's features to anomaly map and score [1].
        score_maps: a detector's record -> the names of its score maps.
        dense: the plain form as one writes it, every pixel through every layer, for `bench --baseline dense`.
        fused: the modules of the fused head, where the method has one.
        svm: the one-class SVM that makes the map of the score maps, and what it sees of them, where there is one.
        pixel_weights: of a layer with a weight for each pixel, [50176, H], where the method has one.
        refit: new networks for what other good frames fit without training the rest; None keeps all of them. The
            authors' files lack that part, so that it is fitted behind `load_official` too.
        load_official: the authors' files in a folder, for a category -> networks and record as of `Fitted`, and what
            the weights are; None where there are none.
    """

    settings: type
    fit: Callable[[Job], Fitted]
    build: Callable[[Mapping[str, Any]], Networks]
    graphs: Callable[[Detector], Networks]
    predictor: Callable[[Detector], Callable[[FrameFeatures], tuple[Tensor, Tensor]]]
    score_maps: Callable[[Mapping[str, Any]], tuple[str, ...]]
    dense: Callable[[Detector], Form]
    fused: Callable[[Detector], FusedHead] | None = None
    svm: Callable[[Detector], tuple[SvmRows, OneClassSvm]] | None = None
    pixel_weights: Callable[[Detector], npt.NDArray[np.float32]] | None = None
    refit: Callable[[Detector, Job], Networks] | None = None
    load_official: Callable[[Path, str, Any], tuple[Fitted, dict[str, WeightsInfo]]] | None = None
