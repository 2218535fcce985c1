"""Queues of a real server: oldest first, with an end in time and number, and what was given up is never computed.

The head waits while a file is there and holds everything behind it back, so that nothing here depends on speed. (A
stage process that is stopped by SIGSTOP takes Triton 2.51 with it.)
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from m3ad.bundle import Bundle
from m3ad.contract import Dims
from m3ad.frames import Frame
from m3ad.methods import contract_of
from m3ad.preprocess import prepare
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspector, model_arrays
from m3ad_triton.config import Queue
from m3ad_triton.heal import Watch
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from m3ad_triton.stage_model import TritonPythonModel, nothing
from serving import make_frame, rehash, renamed
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

LONGEST_S = 60.0
PLACES = 3
STAGES = ("rgb_extractor", "xyz_extractor", "head")
WATCHED = """
import time
from pathlib import Path

from m3ad_triton.stage_model import TritonPythonModel as Stage


class TritonPythonModel(Stage):
    def execute(self, requests):
        while self.stage.name == "head" and Path({folder!r}, "hold").exists():
            time.sleep(0.01)
        return super().execute(requests)

    def computed(self, request):
        with Path({folder!r}, "computed").open("a") as log:
            print(self.stage.name, file=log)
        return super().computed(request)
"""


@pytest.fixture(scope="module")
def queued(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """At `hasty` frames wait for 0.2 s, at `tiny` any number for ever, at `small` PLACES; all share their stages."""
    folder = tmp_path_factory.mktemp("queues")
    for name, queue in (
        ("tiny", Queue(timeout_s=0, frames=0)),
        ("hasty", Queue(timeout_s=0.2)),
        ("small", Queue(timeout_s=0, frames=PLACES)),
    ):
        bundle, repository = renamed(tiny_bundle, name, folder), folder / "repositories" / name
        write_repository(bundle, repository, "onnxruntime", "fused", queue=queue)
    repositories = sorted((folder / "repositories").iterdir())
    for repository in repositories:
        for stage in STAGES:
            code = repository / f"{repository.name}_{stage}" / "1/model.py"
            code.write_text(WATCHED.format(folder=str(folder)))
        rehash(repository)
    (folder / "computed").touch()
    with LocalServer(repositories) as running:
        yield running


def folder_of(server: LocalServer) -> Path:
    return server.repositories[0].path.parents[1]


def computed(server: LocalServer) -> Counter[str]:
    """How often each stage has computed something."""
    return Counter((folder_of(server) / "computed").read_text().split())


@contextlib.contextmanager
def held(server: LocalServer) -> Iterator[None]:
    """No frame gets past the head."""
    hold = folder_of(server) / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink(missing_ok=True)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Asked:
    """Requests under way to a door, and what came back, in the order in which it came."""

    def __init__(self, server: LocalServer, category: str, door: str, frame: Frame) -> None:
        self.client = grpcclient.InferenceServerClient(server.grpc_url)
        self.answers: list[tuple[int, Any]] = []
        self.calls: list[Any] = []
        arrays: dict[str, Any] = {"rgb": frame.rgb, "xyz": frame.xyz}
        if door == "tensors":
            with TritonInspector(server.grpc_url, category) as inspector:
                given = model_arrays(prepare(frame, inspector.preprocessing))
                arrays = {tensor.name: given[tensor.name] for tensor in inspector.tensors}
        self.model = category if door == "frames" else f"{category}_tensors"
        self.inputs = []
        for name, array in arrays.items():
            entry = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            entry.set_data_from_numpy(array)
            self.inputs.append(entry)

    def send(self, count: int, apart_s: float = 0.0) -> None:
        for _ in range(count):
            number = len(self.calls)

            def keep(result: Any, error: Any, number: int = number) -> None:
                self.answers.append((number, error or float(result.as_numpy("score")[0])))

            wanted = [grpcclient.InferRequestedOutput("score")]
            self.calls.append(
                self.client.async_infer(
                    self.model, self.inputs, keep, outputs=wanted, client_timeout=LONGEST_S
                )
            )
            time.sleep(apart_s)

    def wait(self) -> list[tuple[int, Any]]:
        deadline = time.monotonic() + LONGEST_S
        while len(self.answers) < len(self.calls) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(self.answers) == len(self.calls)  # none is lost
        return self.answers


@pytest.mark.parametrize("door", ["frames", "tensors"])
def test_frames_that_were_given_up_are_not_computed(
    queued: LocalServer, tiny_bundle: Bundle, door: str
) -> None:
    frame = make_frame(1)
    asked = Asked(queued, "tiny", door, frame)
    want = Inspector(tiny_bundle, "fused").inspect(frame).score
    before = computed(queued)
    with held(queued):
        asked.send(1)
        time.sleep(0.5)  # the first one has begun
        asked.send(100)  # as many as once kept the next frame waiting for 18 s
        time.sleep(0.5)
        for call in asked.calls[1:]:
            call.cancel()
        time.sleep(0.5)
    after = Asked(queued, "tiny", door, frame)
    after.send(1)
    ((_, score),) = after.wait()
    assert score == pytest.approx(want, abs=1e-6)
    answers = dict(asked.wait())
    assert answers[0] == pytest.approx(want, abs=1e-6)
    assert all(isinstance(answers[number], InferenceServerException) for number in range(1, 101))
    assert computed(queued) - before == dict.fromkeys(STAGES, 2)


@pytest.mark.parametrize("door", ["frames", "tensors"])
def test_the_oldest_goes_first(queued: LocalServer, tiny_bundle: Bundle, door: str) -> None:
    frame = make_frame(2)
    asked = Asked(queued, "tiny", door, frame)
    want = Inspector(tiny_bundle, "fused").inspect(frame).score
    with held(queued):
        asked.send(8, apart_s=0.3)  # so that they reach the server in this order
    answers = asked.wait()
    assert [number for number, _ in answers] == list(range(8))
    assert all(score == pytest.approx(want, abs=1e-6) for _, score in answers)


@pytest.mark.parametrize("door", ["frames", "tensors"])
def test_who_has_waited_too_long_is_refused(queued: LocalServer, door: str) -> None:
    asked = Asked(queued, "hasty", door, make_frame(3))
    with TritonInspector(queued.grpc_url, "hasty") as client:
        assert client.retries == 0
    before = computed(queued)
    with held(queued):
        asked.send(12)
        time.sleep(1)
    refused = [error for _, error in asked.wait() if isinstance(error, InferenceServerException)]
    assert refused
    assert all(error.status() == "StatusCode.UNAVAILABLE" for error in refused)
    assert all("Request timeout expired" in error.message() for error in refused)
    assert computed(queued) - before == dict.fromkeys(STAGES, 12 - len(refused))
    told = TritonInspector._sentence(client, refused[0])
    assert "is busy and has no room for a further request" in str(told)
    assert "--retries" in str(told)


@pytest.mark.parametrize("door", ["frames", "tensors"])
@pytest.mark.parametrize("count", [12, 100])
def test_who_finds_no_place_is_refused_at_once(
    queued: LocalServer, tiny_bundle: Bundle, door: str, count: int
) -> None:
    frame = make_frame(5)
    want = Inspector(tiny_bundle, "fused").inspect(frame).score
    asked = Asked(queued, "small", door, frame)
    pid, before = queued.pid, computed(queued)
    with held(queued):
        asked.send(1)
        wait_until(lambda: computed(queued) - before == dict.fromkeys(STAGES[:2], 1))  # it has begun
        asked.send(count)
        # One has begun, the next one is taken out of the queue as soon as Triton looks at it, the others have places.
        wait_until(lambda: len(asked.answers) >= count - PLACES - 1)
        told = {(error.status(), error.message()) for _, error in asked.answers}
        problem = Watch(queued, print, timeout_s=1.0)._probe("small")
        assert "in 1 s, nor is any other" in str(problem)  # it has a place of its own, and the head hangs
    ((status, message),) = told
    assert status == "StatusCode.UNAVAILABLE"
    assert "Exceeds maximum queue size" in message
    scores = [answer for _, answer in asked.wait() if isinstance(answer, float)]
    assert len(scores) in (1 + PLACES, 2 + PLACES)
    assert scores == pytest.approx([want] * len(scores), abs=1e-6)
    with TritonInspector(queued.grpc_url, "small") as client:
        refused = next(error for _, error in asked.answers if isinstance(error, InferenceServerException))
        assert "is busy and has no room for a further request" in str(client._sentence(refused))
        assert client.inspect(frame).score == pytest.approx(want, abs=1e-6)
    assert queued.pid == pid


def test_a_client_that_asks_again_gets_in(queued: LocalServer, tiny_bundle: Bundle) -> None:
    frame = make_frame(6)
    with TritonInspector(queued.grpc_url, "small", retries=40) as client:
        asked = Asked(queued, "small", "frames", frame)
        with held(queued):
            asked.send(3 + PLACES)
            wait_until(lambda: len(asked.answers) >= 1)
            again = threading.Timer(1.0, (folder_of(queued) / "hold").unlink)
            again.start()
            found = client.inspect_frame(frame)
    assert found.score == pytest.approx(Inspector(tiny_bundle, "fused").inspect(frame).score, abs=1e-6)


@pytest.mark.parametrize("door", ["frames", "tensors"])
def test_places_of_frames_that_were_given_up_come_free(queued: LocalServer, door: str) -> None:
    """With no time-out, too."""
    asked = Asked(queued, "small", door, make_frame(7))
    with held(queued):
        asked.send(2 + PLACES)
        time.sleep(0.5)
        for call in asked.calls:
            call.cancel()
    asked.wait()
    after = Asked(queued, "small", door, make_frame(7))

    def answered() -> bool:
        after.send(1)
        return isinstance(dict(after.wait())[len(after.calls) - 1], float)

    wait_until(answered)


def test_a_full_queue_that_moves_is_well(queued: LocalServer) -> None:
    asked = Asked(queued, "small", "tensors", make_frame(8))
    asked.send(100)
    assert Watch(queued, print, timeout_s=LONGEST_S)._probe("small") is None
    asked.wait()


def test_wrong_tensors_in_numbers_leave_the_server_alive(queued: LocalServer, tiny_bundle: Bundle) -> None:
    """Refused by a stage that is begun beside another, they ended the server with SIGSEGV."""
    frame = make_frame(4)
    asked = Asked(queued, "hasty", "tensors", frame)
    wrong = next(entry for entry in asked.inputs if entry.name() == "points")
    wrong.set_data_from_numpy(np.full(wrong.shape(), np.nan, np.float32))
    asked.send(12)
    refused = [(error.status(), error.message()) for _, error in asked.wait()]
    looked_at = [message for status, message in refused if status == "StatusCode.INVALID_ARGUMENT"]
    waited = [message for status, message in refused if status == "StatusCode.UNAVAILABLE"]
    assert looked_at
    assert all("`points` holds" in message for message in looked_at)
    assert all("Request timeout expired" in message for message in waited)  # on a slow machine
    assert len(looked_at) + len(waited) == 12
    want = Inspector(tiny_bundle, "fused").inspect(frame).score
    with TritonInspector(queued.grpc_url, "hasty") as client:
        assert client.inspect(frame).score == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_a_stage_of_a_request_that_was_given_up_has_values_of_the_right_sizes(layout: str) -> None:
    contract = contract_of("mentor3ad", Dims())
    sizes = {"N": 1500, "R": 1400}

    def dims(tensor: Any) -> tuple[int, ...]:
        return tuple(sizes.get(dim, dim) for dim in tensor.dims)

    for step in contract.steps(layout):
        stage = contract.stages[step.stage]
        found = nothing(stage, {t.name: np.zeros(dims(t), t.dtype) for t in stage.inputs})
        assert [(name, a.shape, a.dtype) for name, a in found.items()] == [
            (t.name, dims(t), np.dtype(t.dtype)) for t in stage.outputs
        ]
        assert all(np.isnan(a).all() for a in found.values() if a.dtype == np.float32)


def test_a_request_that_was_given_up_reaches_no_stage() -> None:
    class GivenUp:
        def is_cancelled(self) -> bool:
            return True

    model = TritonPythonModel()
    model.stage = contract_of("mentor3ad", Dims()).stages["rgb_extractor"]
    told: list[Any] = []
    model.given_up = lambda request: told.append(request)  # type: ignore[method-assign]
    model.execute([GivenUp()])  # it has no function that could run
    assert len(told) == 1
