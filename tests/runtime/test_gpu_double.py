"""The double of a GPU notices what CUDA and TensorRT forbid; a runner that does such a thing fails its tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_double import MisuseError
from gpu_double import GpuDouble, plan_of
from m3ad_runtime.tensorrt_plan import logger_of
from onnx import TensorProto, helper

ROWS = 2000


def doubling() -> onnx.ModelProto:
    """y [R, 4] = x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@dataclass
class Run:
    """A plan that is ready to run."""

    double: GpuDouble
    stream: Any
    context: Any
    engine: Any
    runtime: Any
    logger: Any
    x: int
    y: int
    arena: int
    sent: np.ndarray
    got: np.ndarray

    def set(self) -> None:
        self.context.set_device_memory(self.arena, 512)
        assert self.context.set_input_shape("x", (ROWS, 4))
        assert self.context.set_tensor_address("x", self.x)
        assert self.context.set_tensor_address("y", self.y)

    def send(self) -> None:
        self.double.driver.memcpy_htod_async(self.x, self.sent, self.stream)

    def execute(self) -> bool:
        return bool(self.context.execute_async_v3(self.stream.handle))

    def fetch(self) -> None:
        self.double.driver.memcpy_dtoh_async(self.got, self.y, self.stream)

    def whole(self) -> None:
        self.set()
        self.send()
        assert self.execute()
        self.fetch()


@pytest.fixture
def run() -> Run:
    double = GpuDouble()
    trt, driver = double.trt, double.driver
    device = driver.Device(0).retain_primary_context()
    device.push()
    logger = logger_of(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan_of(doubling(), "doubling", trt, 512))
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    x, y, arena = (int(driver.mem_alloc(size)) for size in (ROWS * 16, ROWS * 16, 512))
    sent, got = (driver.pagelocked_empty((ROWS, 4), np.float32) for _ in range(2))
    sent[...] = np.arange(ROWS * 4).reshape(ROWS, 4)
    return Run(double, driver.Stream(), context, engine, runtime, logger, x, y, arena, sent, got)


def test_a_run_that_keeps_the_rules_computes(run: Run) -> None:
    run.whole()
    assert np.isnan(run.got).all()  # nothing has run: nobody waited
    run.stream.synchronize()
    np.testing.assert_array_equal(run.got, run.sent * 2)


def changed_too_early(run: Run) -> None:
    run.whole()
    run.sent[5] = 0
    run.stream.synchronize()


def small_output(run: Run) -> None:
    run.set()
    run.context.set_tensor_address("y", run.arena)
    run.send()
    run.execute()
    run.stream.synchronize()


def output_in_place(run: Run) -> None:
    run.set()
    run.context.set_tensor_address("y", run.x)
    run.send()
    run.execute()
    run.stream.synchronize()


def no_shape(run: Run) -> None:
    run.set()
    run.context.shapes.clear()
    run.execute()


def no_address(run: Run) -> None:
    run.set()
    run.context.addresses.pop("y")
    run.execute()


def no_arena(run: Run) -> None:
    run.set()
    run.context.arena = None
    run.execute()


def engine_gone(run: Run) -> None:
    run.engine = None
    run.set()


def event_of_the_future(run: Run) -> None:
    first, second = (run.double.driver.Event().record(run.stream) for _ in range(2))
    first.synchronize()
    second.time_since(first)


def no_context(run: Run) -> None:
    run.double.driver.Context.pop()
    run.stream.synchronize()


def free_while_queued(run: Run) -> None:
    more = run.double.driver.mem_alloc(8)
    run.whole()
    more.free()


MISUSES: list[tuple[Callable[[Run], Any], str]] = [
    (lambda run: run.context.set_device_memory(run.arena + 16, 256), "not aligned to 256 bytes"),
    (lambda run: run.context.set_device_memory(run.arena, 256), "smaller than device_memory_size_v2"),
    (
        lambda run: run.context.set_device_memory(run.sent.ctypes.data // 256 * 256, 512),
        "are not the device's",
    ),
    (lambda run: run.context.set_tensor_address("x", run.x + 16), "not aligned to 256 bytes"),
    (lambda run: run.engine.create_execution_context(0), "memory of its own"),
    (lambda run: run.context.execute_async_v3(0), "a run on no stream"),
    (lambda run: run.double.driver.memcpy_htod_async(run.x, np.zeros(4), run.stream), "from pageable memory"),
    (lambda run: run.double.driver.memcpy_dtoh_async(np.zeros(4), run.y, run.stream), "to pageable memory"),
    (lambda run: run.double.driver.memcpy_htod_async(run.x, run.sent[:, :2], run.stream), "pageable"),
    (lambda run: run.double.driver.memcpy_htod_async(run.x + 256, run.sent, run.stream), "not the device's"),
    (changed_too_early, "changed while a copy from it was queued"),
    (small_output, "doubling: y: 32000 bytes at .* are not the device's"),
    (output_in_place, "share memory"),
    (no_shape, "shapes are missing"),
    (no_address, "addresses are missing"),
    (no_arena, "no memory was set"),
    (engine_gone, "after its engine or runtime is gone"),
    (event_of_the_future, "an event that the stream has not come to"),
    (no_context, "no context is current"),
    (free_while_queued, "freed while work is queued"),
]


@pytest.mark.parametrize(("misuse", "message"), MISUSES, ids=[message for _, message in MISUSES])
def test_a_misuse_is_noticed(run: Run, misuse: Callable[[Run], Any], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        misuse(run)


def test_what_is_left_is_noticed(run: Run) -> None:
    with pytest.raises(AssertionError):
        run.double.assert_given_back()


def test_an_order_of_farewells_is_noticed(run: Run) -> None:
    run.engine = None
    assert run.double.violations == ["an engine is gone before its context"]


def test_a_shape_out_of_the_profile_is_refused(run: Run) -> None:
    assert not run.context.set_input_shape("x", (50177, 4))
    assert run.logger.last() == "x: (50177, 4) is out of the profile"
