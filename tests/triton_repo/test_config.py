import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from m3ad.bundle import Bundle
from m3ad.contract import Dims
from m3ad.methods import contract_of
from m3ad.serving import ServingRecord
from m3ad_triton import config
from m3ad_triton.repository import write_repository
from m3ad_triton.verify import find_problems
from tritonclient.grpc import model_config_pb2 as pb

TRITON = {"float32": pb.TYPE_FP32, "int32": pb.TYPE_INT32}


def parse(path: Path) -> pb.ModelConfig:
    return text_format.Parse(path.read_text(), pb.ModelConfig())


def tensors(entries) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(e.name, e.data_type, tuple(e.dims)) for e in entries]


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_configurations_have_the_contract_s_tensors(layout, request, tiny_bundle: Bundle) -> None:
    repository = request.getfixturevalue(f"{layout}_repository")
    category = {"chain": "tiny", "fused": "other"}[layout]
    table = tiny_bundle.contract.stages
    used = {"chain": ("project", "mfm", "mgm", "vm"), "fused": ("head",)}[layout]
    for name in ("rgb_extractor", "xyz_extractor", *used):
        model = parse(repository / f"{category}_{name}" / "config.pbtxt")
        assert tensors(model.input) == [(t.name, TRITON[t.dtype], t.shape) for t in table[name].inputs]
        assert tensors(model.output) == [(t.name, TRITON[t.dtype], t.shape) for t in table[name].outputs]
        assert model.backend == "python"
        assert [(g.count, g.kind) for g in model.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    door = parse(repository / f"{category}_tensors" / "config.pbtxt")
    contract = tiny_bundle.contract
    assert [t[0] for t in tensors(door.input)] == [t.name for t in contract.inputs]
    assert [t[0] for t in tensors(door.output)] == [t.name for t in contract.outputs]
    frames = parse(repository / category / "config.pbtxt")
    assert {p.name for p in repository.iterdir() if p.is_dir()} == {
        category,
        f"{category}_tensors",
        f"{category}_tensor_gate",
        f"{category}_admit",
        *(step.model_name for step in frames.ensemble_scheduling.step),
    }
    by_frames, by_tensors = ({s.model_name for s in d.ensemble_scheduling.step} for d in (frames, door))
    assert by_frames - by_tensors == {f"{category}_{step}" for step in ("gate", "prepare", "judge")}
    assert by_tensors - by_frames == {f"{category}_{step}" for step in ("tensor_gate", "admit")}


def test_each_door_on_a_cpu_begins_with_a_gate_and_one_step_that_has_a_queue(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Triton 2.51 dies of refusals at the first step, and of refusals where two steps begin side by side."""
    write_repository(
        tiny_bundle.path, tmp_path / "repo", "onnxruntime", queue=config.Queue(timeout_s=1.5, frames=7)
    )
    for door, first, second in (
        ("tiny", "tiny_gate", "tiny_prepare"),
        ("tiny_tensors", "tiny_tensor_gate", "tiny_admit"),
    ):
        ensemble = parse(tmp_path / "repo" / door / "config.pbtxt")
        there, begun, steps = (
            {tensor.name for tensor in ensemble.input},
            [],
            ensemble.ensemble_scheduling.step,
        )
        for _ in range(2):
            ready = [s for s in steps if {*s.input_map.values()} <= there and s.model_name not in begun]
            (step,) = ready  # alone
            begun.append(step.model_name)
            there |= {*step.output_map.values()}
        assert begun == [first, second]
        assert not parse(tmp_path / "repo" / first / "config.pbtxt").HasField("dynamic_batching")
        batching = parse(tmp_path / "repo" / second / "config.pbtxt").dynamic_batching
        assert (batching.priority_levels, batching.default_priority_level) == (2, 2)
        for queue, places in ((batching.default_queue_policy, 7), (batching.priority_queue_policy[1], 4)):
            assert queue.default_timeout_microseconds == 1_500_000
            assert queue.max_queue_size == places
            assert queue.timeout_action == pb.ModelQueuePolicy.REJECT
    turns = {}
    for path in (tmp_path / "repo").glob("*/config.pbtxt"):
        model = parse(path)
        for group in model.instance_group:
            ((turn, count),) = [(r.name, r.count) for r in group.rate_limiter.resources] or [("", 0)]
            turns[model.name.removeprefix("tiny_")] = (turn, count, group.rate_limiter.priority)
        assert model.name.endswith(("prepare", "admit")) is model.HasField("dynamic_batching")
    waiting, begun_turn = (("m3ad_turn", 1, 10**6), ("m3ad_turn", 1, 1))
    assert turns == {
        **dict.fromkeys(("prepare", "admit"), waiting),
        **dict.fromkeys(("rgb_extractor", "xyz_extractor", "head"), begun_turn),
        **dict.fromkeys(("gate", "tensor_gate", "judge"), ("", 0, 0)),
    }


def test_a_queue_without_ends_has_none(tiny_bundle: Bundle, tmp_path: Path) -> None:
    written = write_repository(
        tiny_bundle.path, tmp_path / "repo", "onnxruntime", queue=config.Queue(timeout_s=0, frames=0)
    )
    assert find_problems(written.path) == []
    batching = parse(written.path / "tiny_admit" / "config.pbtxt").dynamic_batching
    for queue in (batching.default_queue_policy, batching.priority_queue_policy[1]):
        assert (queue.default_timeout_microseconds, queue.max_queue_size) == (0, 0)


def test_the_door_for_frames_has_any_client_s_types(fused_repository: Path) -> None:
    door = parse(fused_repository / "other" / "config.pbtxt")
    assert tensors(door.input) == [
        ("rgb", pb.TYPE_UINT8, (-1, -1, 3)),
        ("xyz", pb.TYPE_FP32, (-1, -1, 3)),
    ]
    assert tensors(door.output) == [
        ("score", pb.TYPE_FP32, (1,)),
        ("is_anomalous", pb.TYPE_BOOL, (1,)),
        ("verdict", pb.TYPE_INT32, (1,)),
        ("frame_map", pb.TYPE_FP32, (-1, -1)),
        ("defects", pb.TYPE_STRING, (1,)),
        ("anomaly_map", pb.TYPE_FP32, (224, 224)),
    ]
    # Triton refuses a request that leaves out an output which a step inside reads.
    read = {value for step in door.ensemble_scheduling.step for value in step.input_map.values()}
    assert not read & {t.name for t in door.output}


def test_shared_memory_holds_the_largest_frame(tiny_bundle: Bundle) -> None:
    contract = tiny_bundle.contract
    alone, both = (config.shared_memory_bytes(contract, "fused", frames=f) for f in (False, True))
    # rgb, xyz for each of both steps, and the map: 3 + 2 * 12 + 4 bytes a pixel
    assert both - alone > 4096**2 * (3 + 2 * 12 + 4)
    assert config.shared_memory_bytes(contract, None, frames=False) == 0


def test_every_configuration_says_that_there_is_no_batching(chain_repository: Path) -> None:
    paths = list(chain_repository.glob("*/config.pbtxt"))
    assert len(paths) == 13
    assert all(path.read_text().endswith("\nmax_batch_size: 0\n") for path in paths)


def test_mfm_is_used_twice_the_second_time_on_the_reconstruction(chain_repository: Path) -> None:
    steps = parse(chain_repository / "tiny" / "config.pbtxt").ensemble_scheduling.step
    first, second = (step for step in steps if step.model_name == "tiny_mfm")
    assert dict(first.input_map) == {"rgb_features": "rgb_features", "xyz_features": "xyz_features"}
    assert dict(second.input_map) == {
        "rgb_features": "rgb_reconstructed",
        "xyz_features": "xyz_reconstructed",
    }
    assert dict(second.output_map) == {"mentor": "mentor_reconstructed"}


def test_the_ensemble_carries_what_a_client_must_know(chain_repository: Path, tiny_bundle: Bundle) -> None:
    ensemble = parse(chain_repository / "tiny" / "config.pbtxt")
    record = json.loads(ensemble.parameters["m3ad"].string_value)
    assert record == asdict(ServingRecord.of(tiny_bundle, "chain"))
    serving = json.loads(ensemble.parameters["m3ad_serving"].string_value)
    files = ("rgb_extractor.onnx", "xyz_encoder_cpu.onnx", "mfm.onnx", "mgm.onnx", "vm.onnx")
    assert serving["model_bytes"] >= sum((tiny_bundle.path / "onnx" / f).stat().st_size for f in files)
    assert serving["runtime"] == "onnxruntime"


@pytest.mark.parametrize(("stage", "inputs"), [("mfm", 2), ("vm", 7), ("project", 6)])
def test_warm_up_is_the_golden_frame_s_first_use(
    stage: str, inputs: int, chain_repository: Path, tiny_bundle: Bundle
) -> None:
    folder = chain_repository / f"tiny_{stage}"
    (sample,) = parse(folder / "config.pbtxt").model_warmup
    assert len(sample.inputs) == inputs
    for name, entry in sample.inputs.items():
        golden = np.load(tiny_bundle.file(f"golden/{name}.npy"))
        data = (folder / "warmup" / entry.input_data_file).read_bytes()
        np.testing.assert_array_equal(np.frombuffer(data, golden.dtype).reshape(list(entry.dims)), golden)


def test_device_memory_pool_holds_every_tensor_between_the_stages() -> None:
    # Full size, by hand: image and group tokens, centres, then rows of 768, 1152 and 256 twice.
    rows = 50176 * 2 * (768 + 1152 + 256)
    outputs = 224 * 224 + 1 + 7 * 224 * 224
    size = 4 * (784 * 768 + 1024 * (3 + 1152) + rows + outputs)
    contract = contract_of("mentor3ad", Dims())
    pool = config.intermediate_bytes(contract, "chain")
    assert size <= pool < size + 2**20
    assert config.intermediate_bytes(contract, "fused") < 2**24


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text('name: "x"\nmax_batchsize: 0\n')
    with pytest.raises(ValueError, match=r"2:1.*max_batchsize"):
        config.read_config(path)
