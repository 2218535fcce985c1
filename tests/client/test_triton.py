import json
import subprocess
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import make_input
from m3ad.bundle import Bundle
from m3ad.contract import CONTRACT_VERSION, Stage
from m3ad.errors import FrameError, ServerError
from m3ad.frames import find_pairs
from m3ad.preprocess import ModelInput
from m3ad_client.infer import inspect_samples
from m3ad_client.triton import Tls, TritonInspector
from m3ad_client.triton import _record as read_record
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.endpoints import Tls as ServerTls
from m3ad_triton.server import LocalServer
from m3ad_triton.stage_model import TritonPythonModel
from serving import make_frame, write_frame
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "layout"), [("tiny", "chain"), ("other", "fused")])
def test_the_same_inspection_as_in_process(
    server: LocalServer, tiny_bundle: Bundle, model: str, layout: str
) -> None:
    here = Inspector(tiny_bundle, layout)
    with TritonInspector(server.grpc_url, model) as there:
        assert there.record.score_maps == here.record.score_maps
        for seed in range(3):
            frame = make_frame(seed)
            got, want = (i.inspect(frame, with_maps=seed == 2) for i in (there, here))
            np.testing.assert_allclose(got.anomaly_map, want.anomaly_map, atol=1e-5)
            assert got.score == pytest.approx(want.score, abs=1e-5)
            assert got.is_anomalous == want.is_anomalous
            if seed == 2:
                np.testing.assert_allclose(got.score_maps, want.score_maps, atol=1e-5)
            else:
                assert got.score_maps is None


def test_a_refused_frame_is_a_frame_error_and_the_next_is_served(server: LocalServer) -> None:
    good = make_input(1200)
    with TritonInspector(server.grpc_url, "tiny") as inspector:
        with pytest.raises(FrameError, match=r"refused the request: .*`points` is float32 \[3, 3\]"):
            inspector.inspect_prepared(
                ModelInput(good.image, good.points[:3], good.point_pixel[:3], good.scored_pixel)
            )
        assert inspector.inspect_prepared(good).score > 0


@pytest.mark.parametrize("model", ["tiny", "other"])
def test_tensors_of_wrong_values_are_refused_by_the_server(server: LocalServer, model: str) -> None:
    good = make_input(1200)
    descending, holed = good.point_pixel[::-1].copy(), good.points.copy()
    holed[7] = np.nan
    with TritonInspector(server.grpc_url, model) as inspector:
        with pytest.raises(
            FrameError, match=r"refused the request: .*`point_pixel` holds .* in ascending order"
        ):
            inspector.inspect_prepared(ModelInput(good.image, good.points, descending, good.scored_pixel))
        with pytest.raises(FrameError, match=r"refused the request: .*`points` holds 3 values that are NaN"):
            inspector.inspect_prepared(ModelInput(good.image, holed, good.point_pixel, good.scored_pixel))
        assert inspector.inspect_prepared(good).score > 0


def test_a_server_that_does_not_answer_in_time(server: LocalServer) -> None:
    with TritonInspector(server.grpc_url, "tiny") as inspector:
        inspector.timeout_s = 0.001
        with pytest.raises(ServerError, match=r"did not answer in 0\.001 s; wait longer: --timeout-s"):
            inspector.inspect_prepared(make_input(9000))


def test_a_server_that_goes_away(chain_repository: Path) -> None:
    with LocalServer([chain_repository]) as server:
        inspector = TritonInspector(server.grpc_url)  # one category: no name is needed
        assert inspector.model == "tiny"
    with pytest.raises(ServerError, match="no Triton answers at"):
        inspector.inspect_prepared(make_input(1024))
    inspector.close()


def http_status(server: LocalServer, path: str, headers: dict[str, str] | None = None) -> int:
    """The status of a POST of JSON (or a GET of health and metadata) without any certificate."""
    data = None if "health" in path or path in ("v2", "metrics") else b"{}"
    request = urllib.request.Request(f"{server.http_url}/{path}", data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_tls_both_ways(fused_repository: Path, certificates: dict[str, Path]) -> None:
    ca, cert, key = (certificates[name] for name in ("ca", "cert", "key"))
    # every address of this machine, so that what is bound to loopback alone is seen
    tls = ServerTls(cert=cert, key=key, ca=ca)
    with LocalServer([fused_repository], host="0.0.0.0", tls=tls) as server:
        with TritonInspector(server.grpc_url, tls=Tls(ca=ca, cert=cert, key=key)) as inspector:
            assert inspector.inspect_prepared(make_input(1024)).score > 0
        with pytest.raises(ServerError, match="speaks TLS; add --tls, and --ca"):
            TritonInspector(server.grpc_url, timeout_s=5)
        with pytest.raises(ServerError, match="no Triton answers"):
            TritonInspector(server.grpc_url, tls=Tls(ca=ca), timeout_s=5)
        assert http_status(server, "v2/health/ready") == 200
        command = psutil.Process(server.pid).cmdline()
        (restricted,) = (a for a in command if a.startswith("--http-restricted-api="))
        name, _, value = restricted.rpartition(":")[2].partition("=")
        for headers in ({}, {name: value.strip()}):  # what a user of this machine reads in the process list
            for path in (
                *("v2", "v2/repository/index", "v2/models/other/infer", "v2/models/other/versions/1/infer"),
                *("v2/models/other_head/infer", "v2/models/other/config", "v2/logging", "v2/trace/setting"),
                *(
                    "v2/models/other/stats",
                    "v2/systemsharedmemory/status",
                    "v2/repository/models/other/unload",
                ),
            ):
                assert http_status(server, path, headers) == 403, path
        bound = {c.laddr.port: c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp")}
        assert bound[server.ports.http] == bound[server.ports.metrics] == "127.0.0.1"
        assert bound[server.ports.grpc] in ("0.0.0.0", "::")


def test_plain_http_beside_tls_is_asked_for(fused_repository: Path, certificates: dict[str, Path]) -> None:
    tls = ServerTls(cert=certificates["cert"], key=certificates["key"], http_plain=True)
    with LocalServer([fused_repository], tls=tls) as server:
        assert http_status(server, "v2/repository/index") == 200


def dead_stage(server: LocalServer, name: str) -> int:
    """Kill a stage's process as the kernel does when memory is short; returns its process id."""
    found = (c for c in psutil.Process(server.pid).children() if f"/{name}/" in " ".join(c.cmdline()))
    (stage,) = found
    stage.kill()
    return stage.pid


def test_a_dead_stage_is_no_bad_frame(fused_repository: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_frame(tmp_path, f"{number}", make_frame(number))
    with LocalServer([fused_repository]) as server, TritonInspector(server.grpc_url) as inspector:
        samples = find_pairs(tmp_path)
        results = inspect_samples(inspector, samples, None)
        assert next(results).error is None
        pid = dead_stage(server, "other_head")
        with pytest.raises(
            ServerError, match=r"stage `other_head` of Triton at .* died; m3ad-triton serve starts"
        ):
            next(results)
        command = [Path(sys.executable).parent / "m3ad-client", "infer", tmp_path, "--url", server.grpc_url]
        command += ["--retries", "0"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "error: stage `other_head` of Triton at" in done.stderr
        assert server.look() == f"stage `other_head` (process {pid}) died, killed or out of memory"


class Broken:
    """A stage with a bug, and one that refuses what it is given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "is_refusal"),
    [
        (ValueError("points: not finite"), True),
        (FrameError("too few"), True),
        (KeyError("a bug"), False),
        (RuntimeError("a bug"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_refusal_is_answered_as_an_invalid_argument(
    error: Exception, is_refusal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = types.ModuleType("triton_python_backend_utils")
    backend.TritonError = type(
        "TritonError", (), {"INVALID_ARG": 3, "__init__": lambda self, *args: setattr(self, "args", args)}
    )
    backend.InferenceResponse = lambda error: error
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    kept = types.SimpleNamespace(is_cancelled=lambda: False)
    model = TritonPythonModel()
    model.stage, model.function = Stage("vm", (), ()), Broken(error)
    if is_refusal:
        (answer,) = model.execute([kept])
        assert answer.args == (str(error), 3)
    else:
        with pytest.raises(type(error)):
            model.execute([kept])


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (
            "INTERNAL",
            "in ensemble 'a', Stub process 'a_b_0_0' is not healthy.",
            "stage `a_b` of Triton at .* died",
        ),
        (
            "INTERNAL",
            "Failed to increase the shared memory pool size",
            "broke at this request, .*pool size; look",
        ),
        ("UNAVAILABLE", "x", "no Triton answers"),
        ("NOT_FOUND", "x", r"answered StatusCode\.NOT_FOUND: x"),
    ],
)
def test_what_is_the_server_s_fault_is_a_server_error(
    server: LocalServer, status: str, message: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise InferenceServerException(message, f"StatusCode.{status}")

    with TritonInspector(server.grpc_url, "tiny") as inspector:
        monkeypatch.setattr(inspector.client, "infer", fail)
        with pytest.raises(ServerError, match=told):
            inspector.inspect_prepared(make_input(1024))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), None, True, "1"])
def test_a_threshold_that_gives_no_verdict_is_refused(threshold: object) -> None:
    record = json.dumps({"contract_version": CONTRACT_VERSION, "threshold": threshold})
    with pytest.raises(
        ServerError, match=r"of model `tiny` is .* at `\$\.threshold`.*Write the repository again"
    ):
        read_record("tiny", record)


@pytest.mark.parametrize("text", ["", "[]", "1", "[" * 100_000])
def test_a_record_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(
        ServerError,
        match=r"parameter of model `tiny` is (not valid JSON|damaged: Expected `object`).*Write the",
    ):
        read_record("tiny", text)
