"""A Triton Inference Server on this machine: started on model repositories, watched until ready, stopped for sure.

It knows processes, ports and logs; what is in a repository is `repository`'s and `verify`'s business.
"""

import contextlib
import ctypes
import ipaddress
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from m3ad.errors import ServerError

from m3ad_triton.binary import Binary, find_binary
from m3ad_triton.engines import RUNTIME
from m3ad_triton.line import Line
from m3ad_triton.reload import PREFIX, reload_category
from m3ad_triton.repository import Repository, server_arguments, verify_distinct
from m3ad_triton.served import ServedModels
from m3ad_triton.stubs import Stub, find_stubs, hide_regions, remove_regions

LOOPBACK = "127.0.0.1"
EXIT_TIMEOUT_S = 10
POLL_S = 0.1
WATCH_S = 1.0
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")
# What changes the server or reads this machine's memory: for programs on this machine alone.
LOCAL_APIS = "shared-memory,trace,logging"
# Everything Triton answers over HTTP, health left out.
HTTP_APIS = "metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"
PR_SET_PDEATHSIG = 1
LOG_LINE = re.compile(r"^[EF]\d{4} |UNAVAILABLE|error: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The three ports of a server; 0 takes a free one."""

    http: int = 0
    grpc: int = 0
    metrics: int = 0

    def settled(self, hosts: "Hosts") -> "Ports":
        """The same with every 0 replaced by a port that is free on its host.

        Raises:
            ServerError: a port that was asked for is in use.
        """
        with contextlib.ExitStack() as held:  # all three at once, so that they differ
            chosen = {}
            for name in ("http", "grpc", "metrics"):
                listener = held.enter_context(socket.socket())
                wanted, host = getattr(self, name), getattr(hosts, name)
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
class Hosts:
    """The address each endpoint listens on."""

    http: str = LOOPBACK
    grpc: str = LOOPBACK
    metrics: str = LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificate files of the gRPC endpoint; with `ca` clients must show a certificate signed by it.

    Triton has TLS for gRPC alone. HTTP is therefore kept to this machine and to health, unless `http_plain`.
    """

    cert: Path
    key: Path
    ca: Path | None = None
    http_plain: bool = False

    def arguments(self) -> list[str]:
        """The server's arguments for them."""
        arguments = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.cert}",
            f"--grpc-server-key={self.key}",
        ]
        if self.ca:
            arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.ca}"]
        if not self.http_plain:
            arguments.append(f"--http-restricted-api={HTTP_APIS}:{_nobody()}")
        return arguments

    def client_options(self) -> dict[str, Any]:
        """How the server is reached from its own machine: with its own certificate, under a name in it."""
        files = {
            "root_certificates": self.ca or self.cert,
            "private_key": self.key,
            "certificate_chain": self.cert,
        }
        name = [("grpc.ssl_target_name_override", _name_in(self.cert))]
        return {"ssl": True, "channel_args": name, **{key: str(path) for key, path in files.items()}}


class LocalServer:
    """A running Triton; as a context manager it is ready inside the block and gone after it.

    Args:
        repositories: folders written by `m3ad-triton write`; their models are served together.
        host: address to listen on; 0.0.0.0 lets other machines in. With `tls` it is gRPC's alone, HTTP then answers
            nothing but health and only on this machine, unless `tls.http_plain`.
        metrics_host: address of the metrics; `host` if left out, with `tls` this machine alone.
        ready_timeout_s: how long all models may take to load and warm up.
        tls: certificates of the gRPC endpoint.
        binary: the tritonserver to run.

    Raises:
        ServerError: the server cannot run plans, a port is in use, it stops while starting, or is not ready in time.
        ArtifactError: a repository is none or was changed, or two hold a model of one name.
    """

    def __init__(
        self,
        repositories: Sequence[Path],
        *,
        ports: Ports | None = None,
        host: str = LOOPBACK,
        metrics_host: str | None = None,
        ready_timeout_s: float = 300.0,
        tls: Tls | None = None,
        binary: Binary | None = None,
    ) -> None:
        self.repositories = [Repository.open(path) for path in repositories]
        verify_distinct(self.repositories)
        self.binary = binary or find_binary()
        for repository in self.repositories:
            if repository.manifest.runtime == RUNTIME and self.binary.wheel:
                raise ServerError(
                    f"{repository.path} holds TensorRT plans and the server of the wheel nvidia-pytriton runs on the "
                    f"CPU alone; use the official image: m3ad-triton docker {repository.path}"
                )
        self.tls, self.ready_timeout_s = tls, ready_timeout_s
        self.hosts = Hosts(
            http=LOOPBACK if tls and not tls.http_plain else host,
            grpc=host,
            metrics=metrics_host or (LOOPBACK if tls else host),
        )
        self.asked = ports or Ports()
        self.stubs: list[Stub] = []
        self.changing = threading.Lock()  # held while models or the process are exchanged
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id; the Python stage models run in its children."""
        return self._running().pid

    @property
    def grpc_url(self) -> str:
        """What a client is given as --url."""
        return f"{_reachable(self.hosts.grpc)}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """The HTTP endpoint; with TLS it answers health alone."""
        return f"http://{_reachable(self.hosts.http)}:{self.ports.http}"

    def exposure(self) -> list[str]:
        """What is open to whom, where somebody might be surprised: one line each."""
        if self.tls is None:
            if _is_loopback(self.hosts.grpc):
                return []
            return [
                f"warning: {self.hosts.grpc} lets other machines in without TLS: whoever reaches it can ask for "
                "inspections and read every frame; give --cert, --key and --ca. Shared memory, trace and logging are "
                "closed"
            ]
        if self.tls.http_plain:
            return [
                f"warning: TLS is gRPC's alone, plain HTTP on {self.hosts.http} answers anybody (--http-plain)"
            ]
        return [
            f"TLS is gRPC's alone: HTTP answers health only, on {LOOPBACK} only (everything: --http-plain)"
        ]

    def start(self) -> None:
        """Start the server and wait until every model is ready; on any failure nothing is left running."""
        self.ports = self.asked.settled(self.hosts)
        self.folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=_plain_folder())
        self.log_path = Path(self.folder.name) / "server.log"
        try:
            self.models = ServedModels(Path(self.folder.name), self.repositories)
            self.command = [
                str(self.binary.path),
                *self.binary.arguments(Path(self.folder.name)),
                *server_arguments(
                    self.repositories, [str(place) for place in self.models.places], str(self.models.folder)
                ),
                "--model-control-mode=poll",
                "--repository-poll-secs=1",
                f"--http-address={self.hosts.http}",
                f"--grpc-address={self.hosts.grpc}",
                f"--metrics-address={self.hosts.metrics}",
                f"--http-port={self.ports.http}",
                f"--grpc-port={self.ports.grpc}",
                f"--metrics-port={self.ports.metrics}",
                f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
                *(self.tls.arguments() if self.tls else []),
                *self._closed_to_others(),
            ]
            self._launch()
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> None:
        try:
            with self.log_path.open("wb") as output:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.binary.environment(),
                    start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
                    preexec_fn=_die_with_parent,
                )
            self._wait_until_ready()
            self.stubs = find_stubs(self.pid)
            hide_regions(self.stubs)
        except BaseException:
            self._end(now=True)
            raise

    def stop(self) -> None:
        """Stop the server: SIGTERM, then SIGKILL to it and its stage models when it does not go in time."""
        self._end(now=False)
        self.folder.cleanup()

    def _end(self, *, now: bool) -> None:
        process, self.process = self.process, None
        if process is not None:
            stubs = {*self.stubs, *find_stubs(process.pid)}  # some are there before all models are ready
            process.kill() if now else process.terminate()
            try:
                process.wait(EXIT_TIMEOUT_S + 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):  # its session: stage models that outlived it
                os.killpg(process.pid, signal.SIGKILL)
            remove_regions(stubs)

    def line(self) -> Line:
        """A connection of our own to the server."""
        return Line(self.grpc_url, **(self.tls.client_options() if self.tls else {}))

    def reload(self, path: Path) -> None:
        """Take up a category's repository as it lies at `path` now; raises as `reload_category`."""
        with self.changing, self.line() as line:
            new = reload_category(self.models, line, path, self.ready_timeout_s)
            self.repositories = [
                new if r.manifest.category == new.manifest.category else r for r in self.repositories
            ]
            self.stubs = find_stubs(self.pid)
            hide_regions(self.stubs)

    def restart(self) -> None:
        """End the server at once, whatever state it is in, and start it again: same ports, same models.

        Raises:
            ServerError: it stops while starting, or is not ready in time; then nothing is left running.
        """
        with self.changing:
            self._end(now=True)
            self.models.sweep()  # what a reload that it interrupted left
            self._launch()

    def look(self) -> str | None:
        """What of the server's processes is dead or stopped, in a sentence, after a second; None when all run."""
        process, first = self._running(), self._ailing()
        try:
            return f"tritonserver stopped {_ending(process.wait(WATCH_S))}"
        except subprocess.TimeoutExpired:
            found = [
                told for told in self._ailing() if told in first
            ]  # twice: it may have been about to go by itself
            return f"stage {' and '.join(found)}" if found else None

    def _ailing(self) -> list[str]:
        """Stages that are served and do not run; those of before a reload go by themselves."""
        if not self.changing.acquire(blocking=False):
            return []
        try:
            served = self.models.names()
            alive = [stub for stub in self.stubs if stub.is_alive(self.pid)]
            kept = {stub.model for stub in alive}
            dead = [stub for stub in self.stubs if stub not in alive and stub.model in served - kept]
            stopped = [stub for stub in alive if stub.model in served and stub.is_stopped(self.pid)]
        finally:
            self.changing.release()
        return [f"`{stub.model}` (process {stub.pid}) died, killed or out of memory" for stub in dead] + [
            f"`{stub.model}` (process {stub.pid}) was stopped" for stub in stopped
        ]

    def __enter__(self) -> "LocalServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _closed_to_others(self) -> list[str]:
        """Arguments that keep an endpoint which other machines reach to inspecting."""
        arguments = []
        if not _is_loopback(self.hosts.grpc):
            arguments.append(f"--grpc-restricted-protocol={LOCAL_APIS}:{_nobody()}")
        if not _is_loopback(self.hosts.http):
            arguments.append(f"--http-restricted-api={LOCAL_APIS}:{_nobody()}")
        return arguments

    def _wait_until_ready(self) -> None:
        url, process = f"{self.http_url}/v2/health/ready", self._running()
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        )  # this machine is behind no proxy
        deadline = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(f"tritonserver did not start. {self._last_errors()}")
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                opener.open(url, timeout=5),
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

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ValueError("the server is not running, start it first")
        return self.process


def _nobody() -> str:
    """A header that nobody sends: it cannot hold a line break, also not by who reads it in the process list."""
    return f"nobody={secrets.token_hex()}\n"


def _name_in(cert: Path) -> str:
    """A name that a certificate is for; Python tells of its own by a private function alone."""
    decode = getattr(ssl, "_ssl", None)
    try:
        told = decode._test_decode_cert(str(cert)) if decode else {}
    except (OSError, ssl.SSLError, AttributeError):
        told = {}
    names = [value for kind, value in told.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return str(names[0]) if names else "localhost"


def _is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    return "localhost" if host == "0.0.0.0" else host


def _plain_folder() -> str | None:
    """The folder for temporary files, or /tmp where its path is one that Triton's Python backend cannot take."""
    return None if PLAIN_PATH.fullmatch(tempfile.gettempdir()) else "/tmp"


def _ending(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"


def _die_with_parent() -> None:
    """Let the kernel end the server when the program that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
