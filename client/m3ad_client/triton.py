"""A served pipeline as seen from a client: the same `inspect` as in process, through Triton over gRPC.

The only file that knows tritonclient. What it must know of the bundle (preprocessing, threshold) it reads from the
ensemble's parameters, so that server and client cannot disagree.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import tritonclient.grpc as grpcclient
from m3ad.contract import CONTRACT_VERSION, MAX_POINTS
from m3ad.defects import Defect
from m3ad.errors import ArtifactError, BusyError, FrameError, ServerError
from m3ad.frame_door import DEFECTS, DEPTH, REJECT, REVIEW, RGB, XYZ, tensor_door
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.preprocess import ModelInput, prepare
from m3ad.serving import RECORD_PARAMETER, SERVING_PARAMETER, ServingRecord, stage_named
from m3ad.typed_json import parse_json, typed
from m3ad_runtime.pipeline import Inspection, model_arrays
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from m3ad_client.address import is_loopback, mistake_in, plain_address
from m3ad_client.bench import Counters

REWRITE = "Write the repository again: m3ad-triton write BUNDLE REPO"
Door = Literal["frames", "tensors"]
# What Triton's Python backend answers for ever once a stage's process is gone; the name ends in _INSTANCE_DEVICE.
DEAD_STAGE = re.compile(r"Stub process '(.+?)(?:_\d+_\d+)?' is not healthy")

BUSY = ("Exceeds maximum queue size", "Request timeout expired")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files for a gRPC connection over TLS; without `ca` the system's authorities are trusted."""

    ca: Path | None = None
    key: Path | None = None
    cert: Path | None = None


class TritonInspector:
    """A category served by Triton; close it, or use it as a context manager.

    A frame goes through the door that moves fewer bytes: as it is to the ensemble CATEGORY, or as its tensors to
    CATEGORY_tensors, which alone has score maps. Both give the same inspection.

    Args:
        url: HOST:PORT of the server's gRPC endpoint.
        model: the category, or the ensemble of one of its doors, to use no other; may be left out when the server has
            only one category.
        tls: for a server that speaks TLS.
        timeout_s: for each request.
        retries: of a request that a server cannot take now, because it is started again or its queue is full; the first
            after half a second, then after twice as long each time, up to 5 s.

    Attributes:
        limits: of the verdicts; those of the server, also after it took up others, unless they are set.

    Raises:
        ServerError: nothing answers, the server does not serve the model or is not ready, or it serves another
            contract version.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float = 60.0,
        retries: int = 0,
    ) -> None:
        self.url, self.timeout_s, self.tls, self.retries = plain_address(url), timeout_s, tls, 0
        tls_options = {}
        if tls:
            paths = {"root_certificates": tls.ca, "private_key": tls.key, "certificate_chain": tls.cert}
            tls_options = {"ssl": True, **{k: None if p is None else str(p) for k, p in paths.items()}}
        try:
            self.client = grpcclient.InferenceServerClient(
                self.url, channel_args=_channel_options(self.url), **tls_options
            )
        except OSError as error:
            raise ServerError(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
        try:
            self.doors, parameters = self._find(model)
            self.model = next(iter(self.doors.values()))
            self.serving = _parameter(self.model, parameters[SERVING_PARAMETER])
            self._take(parameters[RECORD_PARAMETER])
            self.limits = self.record.limits
        except BaseException:
            self.close()
            raise
        self.retries = retries  # not to find the server: who mistypes its address is told at once

    def inspect(self, frame: Frame, *, with_maps: bool = False) -> Inspection:
        """Let the server inspect one frame, through the cheaper door.

        Raises:
            FrameError: the frame cannot be inspected, or a stage refused it.
            ServerError: the server does not answer, or it broke: the next frame would fare no better.
        """
        self._refresh()
        if self.door(frame) == "frames" and not with_maps:
            return self.inspect_frame(frame)
        return self.inspect_by_tensors(frame, with_maps=with_maps)

    def _refresh(self) -> None:
        """Follow a server that has taken up another bundle (`m3ad-triton reload`) or was started with one."""
        text = self._parameters(self.model).get(RECORD_PARAMETER, "")
        if text != self._text:
            usual = self.limits == self.record.limits
            self._take(text)
            self.limits = self.record.limits if usual else self.limits

    def _take(self, text: str) -> None:
        self._text, self.record = text, _record(self.model, text)
        self.preprocessing = Preprocessing.from_json(self.record.preprocessing)
        self.tensors = self.record.contract.inputs

    def inspect_by_tensors(self, frame: Frame, *, with_maps: bool = False) -> Inspection:
        """Prepare one frame, let the server inspect its tensors, and judge its map; raises as `inspect`."""
        found = self.inspect_prepared(prepare(frame, self.preprocessing), with_maps=True)
        return found.with_defects(frame, self.record.score_maps, self.preprocessing, self.limits, with_maps)

    def door(self, frame: Frame) -> Door:
        """The door that moves fewer bytes for a frame: its pixels, or at most the tensors and the score maps."""
        if len(self.doors) == 1:
            return next(iter(self.doors))
        dims = (*self.tensors, self.record.contract.outputs[-1])
        tensors = sum(4 * math.prod(MAX_POINTS if isinstance(d, str) else d for d in t.dims) for t in dims)
        return "frames" if frame.rgb.nbytes + frame.xyz.nbytes <= tensors else "tensors"

    def inspect_frame(self, frame: Frame) -> Inspection:
        """Let the server prepare, inspect and judge one frame; raises as `inspect`."""
        wanted = ["score", "anomaly_map", DEFECTS.name]
        arrays: dict[str, npt.NDArray[Any]] = {RGB.name: frame.rgb, XYZ.name: frame.xyz}
        own = {REJECT: self.limits.reject, REVIEW: self.limits.review}
        moved = {name: value for name, value in own.items() if value is not None}
        parameters = moved if self.limits != self.record.limits else None
        values = self._infer(self.doors["frames"], arrays, wanted, parameters)
        judged = Inspection.judged(values["score"], self.limits, values["anomaly_map"], {}, None)
        return replace(judged, defects=_defects(self.model, values[DEFECTS.name].item()))

    def inspect_prepared(self, prepared: ModelInput, *, with_maps: bool = False) -> Inspection:
        """Let the server inspect tensors that are preprocessed already (what the bench calls inference only)."""
        if "tensors" not in self.doors:
            raise ServerError(
                f"model `{self.model}` takes frames alone; leave --model out, or name the category"
            )
        arrays = model_arrays(prepared)
        wanted = ["anomaly_map", "score", *(["score_maps"] if with_maps else [])]
        sent = {tensor.name: arrays[tensor.name] for tensor in self.tensors}
        values = self._infer(self.doors["tensors"], sent, wanted)
        maps = values.get("score_maps")
        return Inspection.judged(values["score"], self.limits, values["anomaly_map"], {}, maps)

    def _infer(
        self,
        model: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        wanted: Sequence[str],
        parameters: Mapping[str, float] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        inputs = []
        for name, array in arrays.items():
            entry = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            entry.set_data_from_numpy(array)
            inputs.append(entry)
        outputs = [grpcclient.InferRequestedOutput(name) for name in wanted]
        result = self._ask("infer", model, inputs, outputs=outputs, parameters=parameters)
        return {name: result.as_numpy(name) for name in wanted}

    def counters(self, door: Door = "tensors") -> dict[str, Counters]:
        """Triton's statistics of every stage behind a door of this category, in the order of the ensemble's steps."""
        config = self._ask("get_model_config", self.doors.get(door, self.model)).config
        names = dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step)
        found = {}
        for name in names:
            (entry,) = self._ask("get_inference_statistics", name).model_stats
            stats = entry.inference_stats
            found[stage_named(name, self.record.category)] = Counters(
                stats.success.count,
                stats.queue.ns,
                stats.compute_input.ns,
                stats.compute_infer.ns,
                stats.compute_output.ns,
            )
        return found

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def __enter__(self) -> "TritonInspector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, model: str | None) -> tuple[dict[Door, str], dict[str, str]]:
        """The doors to use, and the parameters of the first."""
        index = {m.name: m.state for m in self._ask("get_model_repository_index").models}
        if model is None:
            doors = self._doors(index)
            if len({category for category, _ in doors.values()}) != 1:
                offered = ", ".join(dict.fromkeys(category for category, _ in doors.values()))
                none = "none; write a repository: m3ad-triton write BUNDLE REPO"
                raise ServerError(
                    f"choose a category with --model; Triton at {self.url} serves: {offered or none}"
                )
            names = list(doors)
        else:
            names = [name for name in (model, tensor_door(model)) if index.get(name) == "READY"]
        if not names:
            state = f"has it as {index[str(model)] or 'not loaded'}" if model in index else "does not have it"
            offered = ", ".join(dict.fromkeys(category for category, _ in self._doors(index).values()))
            raise ServerError(
                f"Triton at {self.url} cannot serve model `{model}`, it {state}; "
                f"m3ad categories it serves: {offered or 'none'}"
            )
        found: dict[Door, str] = {}
        parameters: dict[str, str] = {}
        for name in names:
            config = self._ask("get_model_config", name).config
            parameters = parameters or {key: value.string_value for key, value in config.parameters.items()}
            taken = {tensor.name for tensor in config.input}
            if DEPTH not in taken:  # our frames have clouds
                found["frames" if RGB.name in taken else "tensors"] = name
        if RECORD_PARAMETER not in parameters or SERVING_PARAMETER not in parameters:
            raise ServerError(
                f"model `{names[0]}` of Triton at {self.url} was not written by m3ad (no parameter "
                f"`{RECORD_PARAMETER}`); name a category's ensemble, not a stage"
            )
        if not found:
            raise ServerError(
                f"model `{names[0]}` of Triton at {self.url} takes depth images alone, and m3ad-client sends clouds; "
                "use the category's door for tensors, or another client"
            )
        return found, parameters

    def _doors(self, index: dict[str, str]) -> dict[str, tuple[str, dict[str, str]]]:
        """Every ensemble of m3ad that is ready: its category, and its parameters."""
        found = {}
        for name in (name for name, state in index.items() if state == "READY"):
            parameters = self._parameters(name)
            if SERVING_PARAMETER in parameters:
                record = _parameter(name, parameters.get(RECORD_PARAMETER, "{}"))
                found[name] = (str(record.get("category", name)), parameters)
        return found

    def _parameters(self, model: str) -> dict[str, str]:
        config = self._ask("get_model_config", model).config
        return {key: value.string_value for key, value in config.parameters.items()}

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        wait_s, left = FIRST_WAIT_S, self.retries
        while True:
            try:
                return getattr(self.client, method)(*arguments, client_timeout=self.timeout_s, **options)
            except InferenceServerException as error:
                if error.status() == "StatusCode.INVALID_ARGUMENT" and method == "infer":
                    raise FrameError(
                        f"Triton at {self.url} refused the request: {error.message()}"
                    ) from error
                if not left or not _passes(error):
                    raise self._sentence(error) from error
            time.sleep(wait_s)
            wait_s, left = min(2 * wait_s, LONGEST_WAIT_S), left - 1

    def _sentence(self, error: InferenceServerException) -> ServerError:
        status, message = error.status(), error.message()
        if status == "StatusCode.UNAVAILABLE" and any(text in message for text in BUSY):
            return BusyError(
                f"Triton at {self.url} is busy and has no room for a further request ({message}); send fewer at "
                "once, or try again: --retries"
            )
        if status == "StatusCode.UNAVAILABLE":
            if mistake := mistake_in(self.url, self.tls is not None):
                return ServerError(mistake)
            return ServerError(
                f"no Triton answers at {self.url} ({message}); start one: m3ad-triton serve REPO, and give its gRPC "
                "port with --url"
            )
        if status == "StatusCode.DEADLINE_EXCEEDED":
            return ServerError(
                f"Triton at {self.url} did not answer in {self.timeout_s:g} s; wait longer: --timeout-s"
            )
        if status == "StatusCode.INTERNAL":
            if died := DEAD_STAGE.search(message):
                return ServerError(
                    f"stage `{died[1]}` of Triton at {self.url} died; m3ad-triton serve starts the server again by "
                    "itself (--retries waits for it), any other server must be restarted"
                )
            return ServerError(
                f"Triton at {self.url} broke at this request, which is no fault of the frame: {message}; look into "
                "the server's log, and restart it: m3ad-triton serve REPO"
            )
        return ServerError(f"Triton at {self.url} answered {status}: {message}")


def _defects(model: str, text: bytes) -> list[Defect]:
    """A part's defects as a server tells them."""
    source = f"the list of defects of model `{model}`"
    try:
        return typed(parse_json(text, source, REWRITE), list[Defect], source, REWRITE)
    except ArtifactError as error:
        raise ServerError(str(error)) from error


def _passes(error: InferenceServerException) -> bool:
    """Whether the next try may fare better: a server that is started again, a stage about to be, a full queue."""
    if error.status() == "StatusCode.INTERNAL":
        return DEAD_STAGE.search(error.message()) is not None
    return bool(error.status() == "StatusCode.UNAVAILABLE")


def _channel_options(address: str) -> list[tuple[str, int]]:
    """Messages of any size, as tritonclient has them; to this machine itself never through a proxy."""
    sizes = [
        (f"grpc.max_{way}_message_length", grpcclient.MAX_GRPC_MESSAGE_SIZE) for way in ("send", "receive")
    ]
    sizes.append(("grpc.max_reconnect_backoff_ms", 2000))  # a server that is started again is found soon
    return [*sizes, *([("grpc.enable_http_proxy", 0)] if is_loopback(address) else [])]


def _record(model: str, text: str) -> ServingRecord:
    version = _parameter(model, text).get("contract_version")
    if version != CONTRACT_VERSION:
        raise ServerError(
            f"model `{model}` was written for contract version {version}, this client speaks {CONTRACT_VERSION}; "
            f"install the same m3ad on both sides. {REWRITE}"
        )
    try:
        return ServingRecord.from_json(text, f"the record of model `{model}`", REWRITE)
    except ArtifactError as error:
        raise ServerError(str(error)) from error


def _parameter(model: str, text: str) -> dict[str, Any]:
    """An object that travels as JSON in an ensemble's parameters."""
    source = f"a parameter of model `{model}`"
    try:
        return typed(parse_json(text, source, REWRITE), dict[str, Any], source, REWRITE)
    except ArtifactError as error:
        raise ServerError(str(error)) from error
