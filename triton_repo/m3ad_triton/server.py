"""A Triton Inference Server on this machine: started on model repositories, watched until ready, stopped for sure.

It knows processes and logs; `endpoints` knows addresses, ports and TLS, `repository` and `verify` what is served.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from m3ad.errors import ServerError

from m3ad_triton.binary import Binary, find_binary
from m3ad_triton.endpoints import LOOPBACK, Hosts, Ports, Tls, closed_to_others, reachable
from m3ad_triton.engines import RUNTIME
from m3ad_triton.line import Line
from m3ad_triton.reload import PREFIX, reload_category
from m3ad_triton.repository import Repository, server_arguments, verify_distinct
from m3ad_triton.served import ServedModels
from m3ad_triton.stubs import Stub, find_stubs, hide_regions, remove_regions

EXIT_TIMEOUT_S = 10
POLL_S = 0.1
WATCH_S = 1.0
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")
PR_SET_PDEATHSIG = 1
LOG_LINE = re.compile(r"^[EF]\d{4} |UNAVAILABLE|error: ")


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
        return f"{reachable(self.hosts.grpc)}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """The HTTP endpoint; with TLS it answers health alone."""
        return f"http://{reachable(self.hosts.http)}:{self.ports.http}"

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
                *closed_to_others(self.hosts),
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


def _plain_folder() -> str | None:
    """The folder for temporary files, or /tmp where its path is one that Triton's Python backend cannot take."""
    return None if PLAIN_PATH.fullmatch(tempfile.gettempdir()) else "/tmp"


def _ending(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"


def _die_with_parent() -> None:
    """Let the kernel end the server when the program that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
