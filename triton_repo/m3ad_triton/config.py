"""Triton model configurations made from the contract, through Triton's own protobuf, so that no field can be misspelt.

It knows the contract and `config.pbtxt`; where files lie is `repository`'s business.
https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from google.protobuf import text_format
from m3ad.contract import Layout, Stage, Step, Tensor
from m3ad.frame_door import (
    ADMIT,
    GATE,
    JUDGE,
    PREPARE,
    TENSOR_GATE,
    door_stages,
    door_steps,
    frame_inputs,
    tensor_door,
    tensor_steps,
)
from m3ad.method import Contract
from m3ad.serving import RECORD_PARAMETER, SERVING_PARAMETER, ServingRecord
from tritonclient.grpc import model_config_pb2 as pb

DTYPES = {
    "float32": pb.TYPE_FP32,
    "int32": pb.TYPE_INT32,
    "uint8": pb.TYPE_UINT8,
    "uint16": pb.TYPE_UINT16,
    "bool": pb.TYPE_BOOL,
    "object": pb.TYPE_STRING,
}
VALUE_BYTES = 4  # every tensor between stages is float32 or int32
STAGE_PARAMETER = "m3ad_stage"
GATES = (GATE, TENSOR_GATE)
WARMUP_FOLDER = "warmup"  # Triton looks for a sample's files there
# Of Triton's rate limiter: models on the CPU take turns, and a frame that has begun goes before one that waits.
TURN, BEGUN, WAITING = "m3ad_turn", 1, 10**6
# Priorities of requests: golden frames go before frames, and have places of their own where those have none left.
GOLDEN, USUAL = 1, 2
GOLDEN_FRAMES = 4


def model_name(category: str, stage: str) -> str:
    """The name of a stage's model; the doors are named as the category and `<category>_tensors`."""
    return f"{category}_{stage}"


def python_stage(
    name: str,
    stage: Stage,
    contract: Contract,
    warmup: Mapping[str, npt.NDArray[Any]],
    refine: float | None = None,
) -> Any:
    """A stage on the CPU, run by the Python backend; `refine` as in `m3ad_runtime.stages.cpu_form`."""
    config = _stage(name, stage, warmup)
    config.backend = "python"
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    _take_turns(config, BEGUN)
    config.parameters[STAGE_PARAMETER].string_value = json.dumps(
        {
            "stage": stage.name,
            "method": contract.method.name,
            "dims": contract.dims.to_json(),
            "lattice": contract.lattice,
            "refine": refine if contract.method.cpu[stage.name].kind == "tiled" else None,
        }
    )
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """How long a frame may wait at a door, and how many may; 0 is without end."""

    timeout_s: float = 30.0
    frames: int = 32  # at a second a frame, about what is answered in that time

    def policy(self, frames: int) -> Any:
        """Triton's policy of a queue with so many places."""
        policy = pb.ModelQueuePolicy(max_queue_size=frames if self.frames else 0)
        if self.timeout_s:
            policy.default_timeout_microseconds = round(self.timeout_s * 1e6)
            policy.timeout_action = pb.ModelQueuePolicy.REJECT
        return policy


QUEUE = Queue()


def frame_step(record: ServingRecord, step: str, queue: Queue, *, on_cpu: bool) -> Any:
    """A step around the stages, run by the Python backend wherever those run.

    At the second one of a door frames wait; who waits longer than that, or comes when as many wait, is answered
    UNAVAILABLE. Triton 2.51 cannot do so in front of steps that are begun side by side: when one fails at once, it
    loses count of the request and dies. Nor can it at the first: an ensemble that is refused while it is being asked
    for takes the gRPC endpoint with it. So a gate stands there that refuses nobody and never waits.
    """
    config = plain_step(
        model_name(record.category, step), door_stages(record.contract, record.depth_type)[step]
    )
    config.parameters[RECORD_PARAMETER].string_value = json.dumps(asdict(record))
    if step in (PREPARE, ADMIT):
        batching = config.dynamic_batching
        batching.priority_levels, batching.default_priority_level = USUAL, USUAL
        batching.default_queue_policy.CopyFrom(queue.policy(queue.frames))
        batching.priority_queue_policy[GOLDEN].CopyFrom(queue.policy(GOLDEN_FRAMES))
        if on_cpu:
            _take_turns(config, WAITING)
    return config


def plain_step(name: str, stage: Stage) -> Any:
    """A step in the Python backend with one instance and nothing else, as the gates are."""
    config = _stage(name, stage, {})
    config.backend = "python"
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def _take_turns(config: Any, priority: int) -> None:
    """Let an instance run only while no other that takes turns does; the next one is that of the lower priority."""
    limiter = config.instance_group[0].rate_limiter
    limiter.priority = priority
    limiter.resources.add(name=TURN, count=1, **{"global": True})


def tensorrt_stage(
    name: str, stage: Stage, plans: Mapping[str, str], warmup: Mapping[str, npt.NDArray[Any]]
) -> Any:
    """A stage as TensorRT plans: compute capability, as in 8.9 -> file name."""
    config = _stage(name, stage, warmup)
    config.platform = "tensorrt_plan"
    config.default_model_filename = next(iter(plans.values()))
    if len(plans) > 1:
        config.cc_model_filenames.update(plans)
    # One instance: with dynamic shapes Triton's instances share no engine, a second would load the weights again.
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)
    return config


def tensor_ensemble(record: ServingRecord, serving: Mapping[str, Any], *, on_cpu: bool) -> Any:
    """The stages as one model, wired as the contract says; `record` and `serving` travel as parameters."""
    contract = record.contract
    steps = tensor_steps(contract, record.layout) if on_cpu else contract.steps(record.layout)
    return _ensemble(tensor_door(record.category), contract.inputs, contract.outputs, steps, record, serving)


def frame_ensemble(record: ServingRecord, serving: Mapping[str, Any]) -> Any:
    """The same between `prepare` and `judge`: frames in, verdict out."""
    contract = record.contract
    judged = door_stages(contract)[JUDGE].outputs
    steps = door_steps(contract, record.layout, record.depth_type)
    return _ensemble(record.category, frame_inputs(record.depth_type), judged, steps, record, serving)


def _ensemble(
    name: str,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    steps: tuple[Step, ...],
    record: ServingRecord,
    serving: Mapping[str, Any],
) -> Any:
    config = pb.ModelConfig(name=name, platform="ensemble")
    _add_tensors(config, inputs, outputs)
    for step in steps:
        config.ensemble_scheduling.step.add(
            model_name=model_name(record.category, step.stage),
            model_version=-1,
            input_map=step.inputs,
            output_map=step.outputs,
        )
    config.parameters[RECORD_PARAMETER].string_value = json.dumps(asdict(record))
    config.parameters[SERVING_PARAMETER].string_value = json.dumps(serving)
    return config


def to_text(config: Any) -> str:
    """The text of a config.pbtxt."""
    # proto3 leaves out a field that equals its default, but Triton wants this one written: no batching.
    return f"{text_format.MessageToString(config)}max_batch_size: 0\n"


def read_config(path: Path) -> Any:
    """Parse a config.pbtxt.

    Raises:
        ValueError: it is not valid; the message tells line and column.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def dtype_name(data_type: int) -> str:
    """The name of a Triton data type, as in TYPE_FP32."""
    return str(pb.DataType.Name(data_type))


def intermediate_bytes(contract: Contract, layout: Layout) -> int:
    """Bytes of all tensors between the stages for the largest cloud, N = R = 50176; rounded up to whole MiB.

    Triton keeps them in its device-memory pool. When the pool (64 MB unless told) cannot hold one, Triton goes through
    host memory instead and says so once in its log.
    """
    table = contract.stages
    sizes = {
        value: tensor.largest_bytes()
        for step in contract.steps(layout)
        for tensor in table[step.stage].outputs
        for value in (step.outputs[tensor.name],)
    }
    return _whole_mib(sum(sizes.values()))


def shared_memory_bytes(contract: Contract, layout: Layout | None, *, frames: bool) -> int:
    """Shared memory the Python backend needs for the largest cloud: inputs and outputs of every model that it runs.

    A quarter on top is what its allocator was seen to lose.

    Args:
        contract: of the served detector.
        layout: whose stages it runs; None where plans run them.
        frames: whether it runs the steps of the door that takes frames, too, of 4096 x 4096 pixels at most.
    """
    table = contract.stages
    stages = [table[name] for name in {step.stage for step in contract.steps(layout)}] if layout else []
    stages += [door_stages(contract)[step] for step in steps_around(frames=frames, on_cpu=layout is not None)]
    tensors = [t for stage in stages for t in (*stage.inputs, *stage.outputs)]
    return _whole_mib(sum(map(Tensor.largest_bytes, tensors)) * 5 // 4)


def _stage(name: str, stage: Stage, warmup: Mapping[str, npt.NDArray[Any]]) -> Any:
    config = pb.ModelConfig(name=name)
    _add_tensors(config, stage.inputs, stage.outputs)
    if not warmup:
        return config
    sample = config.model_warmup.add(name="golden", batch_size=1)
    for tensor in stage.inputs:
        entry = sample.inputs[tensor.name]
        entry.data_type = DTYPES[tensor.dtype]
        entry.dims.extend(warmup[tensor.name].shape)
        entry.input_data_file = tensor.name
    return config


def _add_tensors(config: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    for entries, tensors in ((config.input, inputs), (config.output, outputs)):
        for tensor in tensors:
            entries.add(name=tensor.name, data_type=DTYPES[tensor.dtype], dims=tensor.shape)


def steps_around(*, frames: bool, on_cpu: bool) -> list[str]:
    """The steps that a repository has besides its stages; those of its doors."""
    return [*([GATE, PREPARE, JUDGE] if frames else []), *([TENSOR_GATE, ADMIT] if on_cpu else [])]


def _whole_mib(size: int) -> int:
    return -(-size // 2**20) * 2**20
