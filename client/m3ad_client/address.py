"""The address of a server as people give it: what is wrong with it, and that this machine itself is behind no proxy."""

import contextlib
import ipaddress
import socket
import ssl

from m3ad.errors import ServerError

PROBE_S = 2.0
DEFAULT_PORT = 8001
GET = "GET /v2/health/live HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


def plain_address(url: str) -> str:
    """HOST:PORT of a gRPC endpoint.

    Raises:
        ServerError: the address has the scheme of another protocol, or a path.
    """
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", "grpc") or "/" in rest or not rest or rest.isdigit():
        address = rest.partition("/")[0] or str(DEFAULT_PORT)
        address = f"localhost:{address}" if address.isdigit() else address
        raise ServerError(
            f"--url {url} is no address of gRPC; expected HOST:PORT without a scheme or path, as in --url {address} "
            f"(Triton's gRPC port is {DEFAULT_PORT} unless told, its HTTP port another)"
        )
    return rest


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine itself."""
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def mistake_in(address: str, tls: bool) -> str | None:
    """What a server that gRPC cannot talk to says when it is asked otherwise; None when nothing answers.

    Args:
        address: HOST:PORT.
        tls: whether gRPC was tried over TLS.
    """
    if _first_bytes(address).startswith(b"HTTP/1."):
        return f"{address} is an HTTP port; give the gRPC port of the same server with --url, {DEFAULT_PORT} as a rule"
    speaks_tls = _speaks_tls(address)
    if tls and speaks_tls is False:
        return f"the server at {address} speaks no TLS; leave out --tls (`tls` of a station's camera)"
    if not tls and speaks_tls:
        return (
            f"the server at {address} speaks TLS; add --tls, and --ca with the authority of its certificate "
            "(`tls = true` and `ca` for a station's camera)"
        )
    return None


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]") or address


def _connect(address: str) -> socket.socket:
    port = address.rpartition(":")[2]
    return socket.create_connection((_host(address), int(port) if port.isdigit() else DEFAULT_PORT), PROBE_S)


def _first_bytes(address: str) -> bytes:
    """What a plain HTTP request is answered with, or nothing."""
    with contextlib.suppress(OSError, ValueError), _connect(address) as connection:
        connection.sendall(
            GET.format(host=_host(address)).encode("idna" if not address.isascii() else "ascii")
        )
        return connection.recv(16)
    return b""


def _speaks_tls(address: str) -> bool | None:
    """Whether a TLS handshake is answered by one, whatever the certificate; None when nothing listens."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        connection = _connect(address)
    except (OSError, ValueError):
        return None
    try:
        with connection, context.wrap_socket(connection, server_hostname=_host(address)):
            return True
    except ssl.SSLError as error:
        return error.reason != "WRONG_VERSION_NUMBER" and "RECORD" not in (error.reason or "")
    except (OSError, ValueError):  # it hung up, or waits for something else
        return False
