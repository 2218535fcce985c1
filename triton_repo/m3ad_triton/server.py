"""A Triton Inference Server on this machine: started on model repositories, watched until ready, stopped for sure.

It knows processes, ports and logs; what is in a repository is `repository`'s and `verify`'s business.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from m3ad.errors import ServerError

from m3ad_triton.binary import Binary, find_binary
from m3ad_triton.engines import RUNTIME
from m3ad_triton.repository import Repository, server_arguments

EXIT_TIMEOUT_S = 10
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
LOG_LINE = re.compile(r"^[EF]\d{4} |UNAVAILABLE|error: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The three ports of a server; 0 takes a free one."""

    http: int = 0
    grpc: int = 0
    metrics: int = 0

    def settled(self, host: str) -> "Ports":
        """The same with every 0 replaced by a free port.

        Raises:
            ServerError: a port that was asked for is in use.
        """
        with contextlib.ExitStack() as held:  # all three at once, so that they differ
            chosen = {}
            for name in ("http", "grpc", "metrics"):
                listener = held.enter_context(socket.socket())
                wanted = getattr(self, name)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((host, wanted))
                except OSError as error:
                    raise ServerError(
                        f"{name} port {wanted} on {host} cannot be taken ({error.strerror}); "
                        f"choose another: --{name}-port PORT (0 takes a free one)"
                    ) from error
                chosen[name] = listener.getsockname()[1]
            return Ports(**chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificate files of the gRPC endpoint; with `ca` clients must show a certificate signed by it."""

    cert: Path
    key: Path
    ca: Path | None = None

    def arguments(self) -> list[str]:
        """The server's arguments for them."""
        arguments = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.cert}",
            f"--grpc-server-key={self.key}",
        ]
        if self.ca:
            arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.ca}"]
        return arguments


class LocalServer:
    """A running Triton; as a context manager it is ready inside the block and gone after it.

    Args:
        repositories: folders written by `m3ad-triton write`; their models are served together.
        host: address to listen on; 0.0.0.0 lets other machines in.
        ready_timeout_s: how long all models may take to load and warm up.
        tls: certificates of the gRPC endpoint.
        binary: the tritonserver to run.

    Raises:
        ServerError: the server cannot run plans, a port is in use, it stops while starting, or is not ready in time.
        ArtifactError: a repository is none or was changed.
    """

    def __init__(
        self,
        repositories: Sequence[Path],
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        ready_timeout_s: float = 300.0,
        tls: Tls | None = None,
        binary: Binary | None = None,
    ) -> None:
        self.repositories = [Repository.open(path) for path in repositories]
        self.binary = binary or find_binary()
        for repository in self.repositories:
            if repository.manifest["runtime"] == RUNTIME and self.binary.wheel:
                raise ServerError(
                    f"{repository.path} holds TensorRT plans and the server of the wheel nvidia-pytriton runs on the "
                    f"CPU alone; use the official image: m3ad-triton docker {repository.path}"
                )
        self.host, self.tls, self.ready_timeout_s = host, tls, ready_timeout_s
        self.asked = ports or Ports()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id; the Python stage models run in its children."""
        return self._running().pid

    @property
    def grpc_url(self) -> str:
        """What a client is given as --url."""
        return f"{self._reachable()}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """The HTTP endpoint."""
        return f"http://{self._reachable()}:{self.ports.http}"

    def start(self) -> None:
        """Start the server and wait until every model is ready; on any failure nothing is left running."""
        self.ports = self.asked.settled(self.host)
        self.folder = tempfile.TemporaryDirectory(prefix="m3ad-triton-")
        log = Path(self.folder.name) / "server.log"
        self.log_path = log
        try:
            command = [
                str(self.binary.path),
                *self.binary.arguments(Path(self.folder.name)),
                *server_arguments(self.repositories, [str(r.path) for r in self.repositories]),
                f"--http-address={self.host}",
                f"--grpc-address={self.host}",
                f"--metrics-address={self.host}",
                f"--http-port={self.ports.http}",
                f"--grpc-port={self.ports.grpc}",
                f"--metrics-port={self.ports.metrics}",
                f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
                *(self.tls.arguments() if self.tls else []),
            ]
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.binary.environment(),
                    start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
                    preexec_fn=_die_with_parent,
                )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server: SIGTERM, then SIGKILL to it and its stage models when it does not go in time."""
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(EXIT_TIMEOUT_S + 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):  # its session: stage models that outlived it
                os.killpg(process.pid, signal.SIGKILL)
        self.folder.cleanup()

    def wait(self) -> None:
        """Wait until the server stops by itself.

        Raises:
            ServerError: it stopped with an error.
        """
        code = self._running().wait()
        if code:
            raise ServerError(f"tritonserver stopped with exit code {code}. {self._last_errors()}")

    def __enter__(self) -> "LocalServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        url, process = f"{self.http_url}/v2/health/ready", self._running()
        deadline = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(f"tritonserver did not start. {self._last_errors()}")
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(url, timeout=5),
            ):
                return
            time.sleep(POLL_S)
        raise ServerError(
            f"tritonserver was not ready after {self.ready_timeout_s:g} s; allow more: --ready-timeout-s. "
            f"{self._last_errors()}"
        )

    def _last_errors(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        told = [line for line in lines if LOG_LINE.search(line)] or lines
        return "The end of its log:\n" + "\n".join(told[-8:])

    def _reachable(self) -> str:
        return "localhost" if self.host == "0.0.0.0" else self.host

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ValueError("the server is not running, start it first")
        return self.process


def _die_with_parent() -> None:
    """Let the kernel end the server when the program that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
