"""The steps around the stages in Triton's Python backend: `prepare` and `judge` of one door, `admit` of the other.

The first two call what training, calibration and the in-process pipeline call, with the settings that the model's
parameters hold: the served bundle's record.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.camera import xyz_from_depth
from m3ad.contract import mismatch
from m3ad.errors import FrameError
from m3ad.frame_door import (
    ADMIT,
    DEFECTS,
    DEPTH,
    FRAME_MAP,
    IS_ANOMALOUS,
    JUDGE,
    PREPARE,
    REJECT,
    REVIEW,
    VERDICT,
    door_stages,
)
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.grid import to_frame
from m3ad.judge import defects_of
from m3ad.limits import VERDICTS, Limits, verdict
from m3ad.preprocess import prepare
from m3ad.serving import RECORD_PARAMETER, ServingRecord

from m3ad_triton.backend import Arrays, answer

NAME = (
    "of this request"  # what a frame is called in sentences: "frame of this request has 10 foreground points"
)


class FrameModel:
    """What all have in common: the record, and a function for each request."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the served bundle's record from the model's parameters."""
        parameters = json.loads(args["model_config"])["parameters"]
        text = parameters[RECORD_PARAMETER]["string_value"]
        source, advice = f"the record of model `{args['model_name']}`", "Write the repository again"
        self.take(ServingRecord.from_json(text, source, advice))

    def take(self, record: ServingRecord) -> None:
        """Serve by this record."""
        self.record = record
        self.preprocessing = Preprocessing.from_json(self.record.preprocessing)
        self.stages = door_stages(self.record.contract, self.record.depth_type)

    def cloud(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        """The points of a request's frame: as they came, or from its depth image."""
        depth = self.record.depth
        return xyz_from_depth(arrays[DEPTH], depth.camera) if depth else arrays["xyz"]


class Prepare(FrameModel):
    """rgb and xyz or depth -> the tensors of the detector's method."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Prepare the frame of each request."""
        return [answer(request, self.stages[PREPARE].inputs, self.tensors) for request in requests]

    def tensors(self, arrays: Arrays) -> Arrays:
        """The tensors that the method declares."""
        if problem := mismatch(self.stages[PREPARE].inputs, arrays):
            raise FrameError(problem)
        prepared = prepare(Frame(arrays["rgb"], self.cloud(arrays), NAME), self.preprocessing)._asdict()
        return {tensor.name: prepared[tensor.name] for tensor in self.stages[PREPARE].outputs}


class Admit(FrameModel):
    """The tensors of a request as they are, if they fit: the queue of the door for tensors ends here."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Hand each request's tensors on."""
        return [answer(request, self.stages[ADMIT].inputs, self.fitting) for request in requests]

    def fitting(self, arrays: Arrays) -> Arrays:
        """The same; what does not fit is refused here, where Triton begins one step and not several."""
        if problem := mismatch(self.stages[ADMIT].inputs, arrays):
            raise FrameError(problem)
        return {tensor.name: arrays[tensor.name] for tensor in self.stages[ADMIT].outputs}


class Judge(FrameModel):
    """anomaly_map, score, score_maps, xyz or depth -> verdict, defects, and the map on the frame's pixels."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Judge the part of each request, by its own limits where it has some."""
        inputs = self.stages[JUDGE].inputs
        return [answer(request, inputs, partial(self.judged, request)) for request in requests]

    def judged(self, request: Any, arrays: Arrays) -> Arrays:
        """The outputs of the door."""
        return self.outputs(arrays, moved(self.record.limits, json.loads(request.parameters())))

    def outputs(self, arrays: Arrays, limits: Limits) -> Arrays:
        """The same by these limits."""
        anomaly_map, xyz = arrays["anomaly_map"], self.cloud(arrays)
        score = float(arrays["score"][0])
        said = verdict(score, limits)
        maps, names = arrays["score_maps"], self.record.score_maps
        found = defects_of(anomaly_map, score, maps, names, xyz, self.preprocessing, limits)
        text = json.dumps([defect.to_json() for defect in found], allow_nan=False)
        return {
            "score": arrays["score"],
            IS_ANOMALOUS.name: np.array([said == "defect"]),
            VERDICT.name: np.array([VERDICTS.index(said)], np.int32),
            FRAME_MAP.name: to_frame(anomaly_map, xyz.shape[0], xyz.shape[1], self.preprocessing.geometry),
            DEFECTS.name: np.array([text.encode()], np.object_),
            "anomaly_map": anomaly_map,
        }


def moved(limits: Limits, parameters: Mapping[str, Any]) -> Limits:
    """The limits that a request asks for: parameters `threshold` and `review`, numbers or texts of numbers.

    Raises:
        ValueError: one is no number, or they are out of order.
    """
    own = {}
    for name in (REJECT, REVIEW):
        value = parameters.get(name)
        try:
            own[name] = None if value is None else float(value)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"parameter `{name}` is {value!r}, expected a number") from error
        if isinstance(value, bool):
            raise ValueError(f"parameter `{name}` is {value!r}, expected a number")
    return limits.moved(own[REJECT], own[REVIEW])
