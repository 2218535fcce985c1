"""Our own connection to a server: whether its models are ready, and what it says of frames that are known."""

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import tritonclient.grpc as grpcclient
from m3ad.errors import ServerError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from m3ad_triton.config import GOLDEN
from m3ad_triton.frame_checks import FrameCheck
from m3ad_triton.golden import ANSWER, Golden

POLL_S = 0.1
ASK_S = 5.0  # for what needs no inference


class Line:
    """A gRPC connection to a server.

    Args:
        url: HOST:PORT.
        options: further arguments of tritonclient's InferenceServerClient, such as those for TLS.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        channel = [("grpc.enable_http_proxy", 0), *options.pop("channel_args", [])]
        sizes = [(f"grpc.max_{way}_message_length", 2**31 - 1) for way in ("send", "receive")]
        self.client = grpcclient.InferenceServerClient(url, channel_args=[*channel, *sizes], **options)

    def difference(self, golden: Golden, timeout_s: float, model: str | None = None) -> str | None:
        """Ask for a golden frame: what differs from the bundle's answer, or None.

        Args:
            golden: the frame and its answer.
            timeout_s: how long the server may take.
            model: to ask instead of the door.

        Raises:
            InferenceServerException: there is no answer.
        """
        return golden.difference(self._infer(model or golden.door, golden.inputs, ANSWER, timeout_s))

    def frame_difference(self, check: FrameCheck, timeout_s: float, model: str | None = None) -> str | None:
        """Ask `prepare` or `judge` alone: what differs from what this process makes of the frame, or None.

        Raises:
            InferenceServerException: there is no answer.
        """
        name = model or check.model
        wanted = () if isinstance(check.answer, str) else [*check.answer]
        try:
            found: dict[str, Any] | str = self._infer(name, check.inputs, wanted, timeout_s)
        except InferenceServerException as error:
            if error.status() != "StatusCode.INVALID_ARGUMENT":
                raise
            found = error.message()
        problem = check.difference(found)
        return f"`{name}`: {problem}" if problem else None

    def _infer(
        self, model: str, arrays: Mapping[str, Any], wanted: Sequence[str], timeout_s: float
    ) -> dict[str, Any]:
        inputs = []
        for name, array in arrays.items():
            entry = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            entry.set_data_from_numpy(array)
            inputs.append(entry)
        outputs = [grpcclient.InferRequestedOutput(name) for name in wanted]
        found = self.client.infer(
            model, inputs, outputs=outputs or None, client_timeout=timeout_s, priority=GOLDEN
        )
        return {name: found.as_numpy(name) for name in wanted}

    def wait_until_ready(self, models: Iterable[str], timeout_s: float) -> None:
        """Wait until each of these models is loaded.

        Raises:
            ServerError: Triton refused one, or they were not ready in time.
        """
        wanted, deadline = {*models}, time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            index = {entry.name: entry for entry in self._ask("get_model_repository_index").models}
            for name in sorted(wanted & index.keys()):
                if index[name].state == "UNAVAILABLE" and index[name].reason != "unloaded":
                    raise ServerError(f"Triton does not load model `{name}`: {index[name].reason}")
            wanted -= {name for name, entry in index.items() if entry.state == "READY"}
            if not wanted:
                return
            time.sleep(POLL_S)
        raise ServerError(f"Triton had not loaded {', '.join(sorted(wanted))} after {timeout_s:g} s")

    def steps(self, door: str) -> list[str]:
        """The models that an ensemble leads to, in order.

        Raises:
            ServerError: the server does not say.
        """
        told = self._ask("get_model_config", door).config
        return [step.model_name for step in told.ensemble_scheduling.step]

    def wait_until_wired(self, door: str, steps: Iterable[str], timeout_s: float) -> None:
        """Wait until an ensemble leads to these models.

        Raises:
            ServerError: it did not in time.
        """
        wanted, deadline = [*steps], time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.steps(door) == wanted:
                return
            time.sleep(POLL_S)
        raise ServerError(f"Triton had not taken up `{door}` after {timeout_s:g} s")

    def answered(self, model: str) -> int:
        """How many requests a model has answered.

        Raises:
            ServerError: the server does not say.
        """
        (entry,) = self._ask("get_inference_statistics", model).model_stats
        return int(entry.inference_stats.success.count)

    def _ask(self, method: str, *arguments: str) -> Any:
        try:
            return getattr(self.client, method)(*arguments, client_timeout=ASK_S)
        except InferenceServerException as error:
            raise ServerError(f"Triton at {self.url} does not answer: {error.message()}") from error

    def __enter__(self) -> "Line":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
