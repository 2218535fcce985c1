"""Addresses as people give them: each mistake is named, and loopback never goes through a proxy."""

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from m3ad.errors import ServerError
from m3ad_client.address import is_loopback, plain_address
from m3ad_client.triton import Tls, TritonInspector


@contextmanager
def grpc_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """A real gRPC server without any service: it answers UNIMPLEMENTED to everything."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8001", "https://h:1", "127.0.0.1:8001/v2", "grpc://", "8001"]
)
def test_a_scheme_or_path_is_named(url: str) -> None:
    with pytest.raises(
        ServerError, match=r"--url .* is no address of gRPC; expected HOST:PORT .* as in --url \S+:\d+"
    ):
        TritonInspector(url)
    assert plain_address("grpc://h:1") == plain_address("h:1") == "h:1"


def test_an_http_port_is_named() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(
            ServerError, match=r"127.0.0.1:\d+ is an HTTP port; give the gRPC port .* 8001 as a rule"
        ):
            TritonInspector(f"127.0.0.1:{server.server_port}", timeout_s=20)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_tls_on_one_side_only_is_named(tmp_path: Path) -> None:
    with grpc_server() as port, pytest.raises(ServerError, match=r"speaks no TLS; leave out --tls"):
        TritonInspector(f"127.0.0.1:{port}", tls=Tls(), timeout_s=20)
    openssl = shutil.which("openssl")
    assert openssl
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    subject = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([openssl, *request, *subject], check=True, capture_output=True)
    assert ssl.create_default_context(cafile=str(cert))
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with (
        grpc_server(credentials) as port,
        pytest.raises(ServerError, match=r"speaks TLS; add --tls, and --ca"),
    ):
        TritonInspector(f"127.0.0.1:{port}", timeout_s=20)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_goes_through_no_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with grpc_server() as port, pytest.raises(ServerError, match=r"answered StatusCode\.UNIMPLEMENTED"):
        TritonInspector(f"{host}:{port}", timeout_s=20)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:8001", True), ("localhost:1", True), ("localhost", True),
     ("10.0.0.1:1", False), ("box:8001", False), ("localhost.example.org:1", False)],
)  # fmt: skip
def test_this_machine_is_told_from_others(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
