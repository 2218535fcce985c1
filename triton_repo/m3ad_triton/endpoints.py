"""Where a server listens, and who gets in: its addresses and ports, TLS, and what is closed to other machines."""

import contextlib
import ipaddress
import secrets
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3ad.errors import ServerError

LOOPBACK = "127.0.0.1"
# What changes the server or reads this machine's memory: for programs on this machine alone.
LOCAL_APIS = "shared-memory,trace,logging"
# Everything Triton answers over HTTP, health left out.
HTTP_APIS = "metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The address each endpoint listens on."""

    http: str = LOOPBACK
    grpc: str = LOOPBACK
    metrics: str = LOOPBACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The three ports of a server; 0 takes a free one."""

    http: int = 0
    grpc: int = 0
    metrics: int = 0

    def settled(self, hosts: Hosts) -> "Ports":
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


def exposure(hosts: Hosts, tls: Tls | None) -> list[str]:
    """What is open to whom, where somebody might be surprised: one line each."""
    if tls is None:
        if _is_loopback(hosts.grpc):
            return []
        return [
            f"warning: {hosts.grpc} lets other machines in without TLS: whoever reaches it can ask for "
            "inspections and read every frame; give --cert, --key and --ca. Shared memory, trace and logging are "
            "closed"
        ]
    if tls.http_plain:
        return [f"warning: TLS is gRPC's alone, plain HTTP on {hosts.http} answers anybody (--http-plain)"]
    return [f"TLS is gRPC's alone: HTTP answers health only, on {LOOPBACK} only (everything: --http-plain)"]


def closed_to_others(hosts: Hosts) -> list[str]:
    """Arguments that keep an endpoint which other machines reach to inspecting."""
    arguments = []
    if not _is_loopback(hosts.grpc):
        arguments.append(f"--grpc-restricted-protocol={LOCAL_APIS}:{_nobody()}")
    if not _is_loopback(hosts.http):
        arguments.append(f"--http-restricted-api={LOCAL_APIS}:{_nobody()}")
    return arguments


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


def reachable(host: str) -> str:
    """The name under which this machine reaches an address that its server listens on."""
    return "localhost" if host == "0.0.0.0" else host
