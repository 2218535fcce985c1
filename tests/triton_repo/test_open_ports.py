"""Every port that a server listens on, asked by somebody who has no certificate."""

import http.client
import json
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from m3ad_triton.line import Line
from serving import make_frame
from test_server import served, tree
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

pytestmark = pytest.mark.slow
PATHS = (
    "/",
    "/health",
    "/metrics",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/logging",
    "/v2/models/other/config",
    "/v2/models/other/infer",
    "/v2/models/other/ready",
    "/v2/models/other/stats",
    "/v2/repository/index",
    "/v2/systemsharedmemory/status",
    "/v2/trace/setting",
)


def frame_as_json() -> bytes:
    frame = make_frame(0, 48)
    arrays = (("rgb", "UINT8", frame.rgb), ("xyz", "FP32", np.nan_to_num(frame.xyz)))
    inputs = [
        {"name": name, "datatype": kind, "shape": array.shape, "data": array.ravel().tolist()}
        for name, kind, array in arrays
    ]
    return json.dumps({"inputs": inputs}).encode()


POSTED = {"/v2/models/other/infer": frame_as_json, "/v2/repository/index": lambda: b"{}"}


def listening(pid: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that a process or one below it listens on."""
    found = set()
    for process in tree(pid):
        for socket in process.net_connections(kind="inet"):
            assert socket.status == psutil.CONN_LISTEN or socket.raddr, socket  # nothing waits for UDP
            if socket.status == psutil.CONN_LISTEN:
                found.add((socket.laddr.ip, socket.laddr.port))
    return found


def unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def by_http(port: int) -> Iterator[str]:
    """Which of Triton's and our own addresses give an answer over HTTP, plain and in TLS without a certificate.

    `empty` ones are told by their code alone.
    """
    for scheme in ("http", "https"):
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified())]
        opener = urllib.request.build_opener(*handlers)
        for path in PATHS:
            body = POSTED[path]() if path in POSTED else None
            try:
                with opener.open(f"{scheme}://127.0.0.1:{port}{path}", body, timeout=30) as answer:
                    yield f"{scheme} {path}{'' if answer.read(1) else ', empty'}"
            except (OSError, http.client.HTTPException):  # refused with a code, or it speaks otherwise
                pass


def by_grpc(port: int, options: dict[str, Any]) -> Iterator[str]:
    """What is answered over gRPC."""
    frame = make_frame()
    inputs = []
    for name, array in (("rgb", frame.rgb), ("xyz", frame.xyz)):
        inputs.append(grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with Line(f"localhost:{port}", **options) as line:
        client = line.client
        asked: dict[str, Callable[[], Any]] = {
            "live": lambda: client.is_server_live(client_timeout=10),
            "metadata": lambda: client.get_server_metadata(client_timeout=10),
            "infer": lambda: client.infer("other", inputs, client_timeout=60),
            "index": lambda: client.get_model_repository_index(client_timeout=10),
            "register": lambda: client.register_system_shared_memory("x", "/x", 8, client_timeout=10),
        }
        for name, ask in asked.items():
            try:
                ask()
            except InferenceServerException as error:
                if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.UNIMPLEMENTED"):
                    continue
            yield f"grpc {name}"


def strangers_answers(port: int, ca: Path | None = None) -> set[str]:
    """What a port says to whom without a certificate."""
    told = {*by_http(port), *by_grpc(port, {})}
    if ca:
        told |= {f"TLS {name}" for name in by_grpc(port, {"ssl": True, "root_certificates": str(ca)})}
    return told


def test_with_tls_nothing_answers_without_a_certificate_but_what_is_named(
    fused_repository: Path, certificates: dict[str, Path]
) -> None:
    files = [word for name in ("cert", "key", "ca") for word in (f"--{name}", certificates[name])]
    with served(fused_repository, "--host", "0.0.0.0", *files, "--health-port", "0") as (process, told):
        grpc, plain, health = (
            int(told[name].removesuffix("/health").rpartition(":")[2])
            for name in ("grpc_url", "http_url", "health_url")
        )
        found = listening(process.pid)
        (metrics,) = {port for _, port in found} - {grpc, plain, health}
        assert {(address.removeprefix("::ffff:"), port) for address, port in found if port != grpc} == {
            ("127.0.0.1", plain),
            ("127.0.0.1", health),
            ("127.0.0.1", metrics),
        }
        answers = {port: strangers_answers(port, certificates["ca"]) for _, port in found}
        own = {"ssl": True, "root_certificates": str(certificates["ca"])}
        own |= {"private_key": str(certificates["key"]), "certificate_chain": str(certificates["cert"])}
        assert {*by_grpc(grpc, own)} >= {"grpc live", "grpc metadata", "grpc infer"}
    health_of = ("health/live", "health/ready", "models/other/ready")
    elsewhere = {*PATHS} - {*POSTED, "/metrics"}  # Triton's port of metrics says 200 and no more
    assert answers == {
        grpc: set(),
        plain: {f"http /v2/{what}, empty" for what in health_of},
        metrics: {"http /metrics", *(f"http {path}, empty" for path in elsewhere)},
        health: {"http /health"},
    }


def test_the_same_questions_are_answered_where_there_is_no_tls(fused_repository: Path) -> None:
    with served(fused_repository) as (_, told):
        grpc, plain = (int(told[name].rpartition(":")[2]) for name in ("grpc_url", "http_url"))
        assert strangers_answers(grpc) >= {"grpc live", "grpc metadata", "grpc infer"}
        assert strangers_answers(plain) >= {"http /v2", "http /v2/models/other/infer"}
