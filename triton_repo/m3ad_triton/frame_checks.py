"""What `gate`, `prepare` and `judge` of a category have to answer to a frame that is made here.

The golden frame goes through the door for tensors, and so around all three. The frame is a bumpy plate above its
support; a category that refuses it (no such plane, another size) has to refuse it with the same sentence.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.camera import MILLIMETRE
from m3ad.errors import FrameError
from m3ad.frame_door import DEPTH, GATE, JUDGE, PLACE, PREPARE
from m3ad.frame_settings import Preprocessing
from m3ad.serving import ServingRecord

from m3ad_triton.backend import Arrays
from m3ad_triton.config import model_name, read_config
from m3ad_triton.frame_models import Judge, Prepare
from m3ad_triton.golden import Golden
from m3ad_triton.repository import Repository, record_of

SIDE = 224  # of a frame whose size nothing says
DISTANCE_M, EXTENT_M = 0.5, 0.1  # of the plate, where nothing says them
MIDDLE = 0.3  # the plate's half side, in half sides of the frame
CLOSE = 1e-4  # of a value, or of 1 where it is smaller


@dataclass(frozen=True, slots=True)
class FrameCheck:
    """What is asked of the model `model` alone, and its answer; a sentence where it has to refuse."""

    model: str
    inputs: Arrays
    answer: Arrays | str

    def difference(self, found: Mapping[str, npt.NDArray[Any]] | str) -> str | None:
        """What differs between a server's answer or refusal and ours, in a sentence; None when they agree."""
        if isinstance(self.answer, str):
            told = found if isinstance(found, str) else "an answer"
            return None if self.answer in told else f"gives {told}, expected the refusal: {self.answer}"
        if isinstance(found, str):
            return f"refuses a frame that is good: {found}"
        differ = [name for name, want in self.answer.items() if not _agree(found[name], want)]
        return f"`{differ[0]}` is not what m3ad makes of the same frame" if differ else None


def frame_checks(repository: Repository, golden: Golden) -> tuple[FrameCheck, ...]:
    """The checks of `gate`, `prepare` and `judge` (of the golden map); none where no door takes frames.

    Raises:
        ArtifactError: the record that the steps are served by is none.
    """
    manifest = repository.manifest
    if not manifest.frames:
        return ()
    record = record_of(read_config(repository.path / model_name(manifest.category, PREPARE) / "config.pbtxt"))
    prepare, judge = Prepare(), Judge()
    prepare.take(record)
    judge.take(record)
    place = {PLACE.name: np.zeros(1, PLACE.dtype)}
    frame = {**_plate(record), **place}
    asked = {tensor.name: frame[tensor.name] for tensor in prepare.stages[PREPARE].inputs}
    score = record.limits.reject + max(1.0, abs(record.limits.reject))  # so that there are defects to find
    maps = np.linspace(0.5, 1, len(record.score_maps), dtype=np.float32)[:, None, None]
    known = {
        **frame,
        "anomaly_map": golden.answer["anomaly_map"],
        "score": np.array([score], np.float32),
        "score_maps": maps * golden.answer["anomaly_map"],
    }
    judged = {tensor.name: known[tensor.name] for tensor in judge.stages[JUDGE].inputs}
    made = _made(lambda arrays: judge.outputs(arrays, record.limits), judged)
    (picture,) = prepare.stages[GATE].inputs
    return (
        FrameCheck(model_name(record.category, GATE), {picture.name: frame[picture.name]}, place),
        FrameCheck(model_name(record.category, PREPARE), asked, _made(prepare.tensors, asked)),
        FrameCheck(model_name(record.category, JUDGE), judged, made),
    )


def _made(function: Callable[[Arrays], Arrays], arrays: Arrays) -> Arrays | str:
    try:
        return function(arrays)
    except (FrameError, ValueError) as error:
        return str(error)


def _agree(found: npt.NDArray[Any], want: npt.NDArray[Any]) -> bool:
    if want.dtype == object:
        return _alike(json.loads(found.item()), json.loads(want.item()))
    if want.dtype.kind != "f":
        return np.array_equal(found, want)
    return found.shape == want.shape and np.allclose(found, want, rtol=CLOSE, atol=CLOSE, equal_nan=True)


def _alike(found: Any, want: Any) -> bool:
    """JSON whose numbers are close."""
    if isinstance(want, dict):
        return (
            isinstance(found, dict)
            and found.keys() == want.keys()
            and all(_alike(found[k], want[k]) for k in want)
        )
    if isinstance(want, list):
        return isinstance(found, list) and len(found) == len(want) and all(map(_alike, found, want))
    if isinstance(want, float):
        return isinstance(found, int | float) and abs(found - want) <= CLOSE * max(1.0, abs(want))
    return bool(found == want)


def _plate(record: ServingRecord) -> Arrays:
    """A frame as a camera sees it from straight above: rgb, and xyz or depth."""
    preprocessing, depth = Preprocessing.from_json(record.preprocessing), record.depth
    sized = depth.camera if depth else preprocessing.regions
    height, width = (sized.height, sized.width) if sized else (SIDE, SIDE)
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    extent = preprocessing.extent_m or EXTENT_M
    if depth:  # the camera says how far away a plate of this extent has to be
        camera = depth.camera
        slope_x, slope_y = width / 2 / camera.fx, height / 2 / camera.fy
        distance = extent / (2 * MIDDLE * float(np.hypot(slope_x, slope_y)))
    else:
        distance = DISTANCE_M
        if preprocessing.plane_coefficients and (found := _along_axis(preprocessing.plane_coefficients)):
            distance = found
        slope_x = slope_y = extent / (2 * MIDDLE * np.sqrt(2) * distance)
    x, y = u * slope_x, v * slope_y
    support = np.full((height, width), distance)
    if preprocessing.plane_coefficients:
        a, b, c, d = preprocessing.plane_coefficients
        with np.errstate(divide="ignore", invalid="ignore"):
            support = np.nan_to_num(-d / (a * x + b * y + c), nan=0.0, posinf=0.0, neginf=0.0)
    lift = preprocessing.plane_distance_m * (4 + 0.5 * np.sin(20 * u) * np.cos(15 * v))
    inside = np.maximum(abs(u), abs(v)) <= MIDDLE
    off = 0.0 if preprocessing.plane == "none" else support
    z = np.where(inside, support - lift, off)
    levels = 128 + 100 * np.sin(np.stack([9 * u, 7 * v, 5 * (u + v)], axis=-1))
    rgb = levels.astype(np.uint8)
    if depth is None:
        return {"rgb": rgb, "xyz": np.stack([x * z, y * z, z], axis=-1).astype(np.float32)}
    whole = depth.dtype == "uint16"
    scale = depth.camera.depth_scale or (MILLIMETRE if whole else 1.0)
    units = np.clip(z / scale, 0, np.iinfo(np.uint16).max) if whole else z / scale
    return {"rgb": rgb, DEPTH: units.astype(depth.dtype)}


def _along_axis(plane: tuple[float, float, float, float]) -> float | None:
    """How far away a plane is straight ahead; None where the camera does not look at it."""
    *_, c, d = plane
    return -d / c if c and -d / c > 0 else None
