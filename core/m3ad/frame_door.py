"""The door that takes frames: what goes in and comes out, and the two steps around a detector's own stages.

`<category>` is `prepare`, the stages of a layout and `judge`; `<category>_tensors` is the stages alone, for whoever
prepares frames and judges maps with m3ad. Where stages run on a CPU, that door has `admit` before them, which hands
tensors on as they are: Triton can bound a queue only in front of a step that begins alone, and that is not an
ensemble's first. So a gate comes before it and before `prepare`.
"""

from typing import Literal

from m3ad.contract import Layout, Stage, Step, Tensor
from m3ad.method import PIPELINE_OUTPUTS, Contract

RGB = Tensor("rgb", ("H", "W", 3), "uint8", unit="8 bits a channel, red first")
XYZ = Tensor(
    "xyz", ("H", "W", 3), unit="m, registered to `rgb` pixel by pixel; holes are (0, 0, 0) or not finite"
)
DepthType = Literal["uint16", "float32"]
DEPTH = "depth"
IS_ANOMALOUS = Tensor("is_anomalous", (1,), "bool", unit="whether the score lies above the reject limit")
VERDICT = Tensor("verdict", (1,), "int32", unit="0 good, 1 review, 2 defect")
FRAME_MAP = Tensor("frame_map", ("H", "W"), unit="the map on the frame's own pixels")
DEFECTS = Tensor(
    "defects", (1,), "object", unit="JSON list of `defects.Defect`; blanks at its end mean nothing"
)
PREPARE, JUDGE, ADMIT = "prepare", "judge", "admit"
GATE, TENSOR_GATE = "gate", "tensor_gate"
PLACE = Tensor("place", (1,), "int32", unit="none; whoever has one asks for a place in the queue")
REJECT, REVIEW = "threshold", "review"  # parameters of a request, which move its limits


def tensor_door(category: str) -> str:
    """The name of the door that takes tensors; the one that takes frames is named as the category."""
    return f"{category}_tensors"


def frame_inputs(depth: DepthType | None = None) -> tuple[Tensor, Tensor]:
    """What a client sends: picture and cloud, or picture and depth image of this type."""
    if depth is None:
        return RGB, XYZ
    unit = "units of the camera's depth_scale along the optical axis; 0 and not finite are holes"
    return RGB, Tensor(DEPTH, ("H", "W"), depth, unit=unit)


def door_stages(contract: Contract, depth: DepthType | None = None) -> dict[str, Stage]:
    """The steps that frames go through besides the detector's stages: two at one door, one at the other."""
    picture, cloud = frame_inputs(depth)
    map_and_score = {tensor.name: tensor for tensor in contract.outputs}
    kept = (map_and_score["score"], IS_ANOMALOUS, VERDICT, FRAME_MAP, DEFECTS, map_and_score["anomaly_map"])
    smallest = min(contract.inputs, key=Tensor.largest_bytes)
    return {
        GATE: Stage(GATE, (picture,), (PLACE,)),
        PREPARE: Stage(PREPARE, (picture, cloud, PLACE), contract.inputs),
        TENSOR_GATE: Stage(TENSOR_GATE, (smallest,), (PLACE,)),
        ADMIT: Stage(ADMIT, (*contract.inputs, PLACE), contract.inputs),
        JUDGE: Stage(JUDGE, (*contract.outputs, cloud), kept),
    }


def tensor_steps(contract: Contract, layout: Layout) -> tuple[Step, ...]:
    """The wiring of the door for tensors that begins with `admit`; what that hands on is named `admitted_*`."""
    admitted = {tensor.name: f"admitted_{tensor.name}" for tensor in contract.inputs}
    stages = [
        Step(step.stage, {k: admitted.get(v, v) for k, v in step.inputs.items()}, step.outputs)
        for step in contract.steps(layout)
    ]
    table = door_stages(contract)
    return (
        Step(TENSOR_GATE, _same(table[TENSOR_GATE].inputs), _same((PLACE,))),
        Step(ADMIT, _same(table[ADMIT].inputs), admitted),
        *stages,
    )


def door_steps(contract: Contract, layout: Layout, depth: DepthType | None = None) -> tuple[Step, ...]:
    """The wiring from a frame to its verdict.

    What the stages end with is named `pipeline_*` between the steps, because Triton refuses a request that leaves out
    an output of the ensemble which is also read inside it.
    """
    inner = {name: f"pipeline_{name}" for name in PIPELINE_OUTPUTS}
    table = door_stages(contract, depth)
    stages = [
        Step(step.stage, step.inputs, {k: inner.get(v, v) for k, v in step.outputs.items()})
        for step in contract.steps(layout)
    ]
    judged = {name: inner.get(name, name) for name in _same(table[JUDGE].inputs)}
    return (
        Step(GATE, _same(table[GATE].inputs), _same((PLACE,))),
        Step(PREPARE, _same(table[PREPARE].inputs), _same(contract.inputs)),
        *stages,
        Step(JUDGE, judged, _same(table[JUDGE].outputs)),
    )


def _same(tensors: tuple[Tensor, ...]) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}
