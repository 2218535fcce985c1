"""The page's server: uvicorn in a thread of the station."""

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from m3ad.errors import ArtifactError
from m3ad.ledger import Ledger

from m3ad_client.station import config
from m3ad_client.station.line import Line
from m3ad_client.station.needs import needed
from m3ad_client.station.sinks.webhook import read_secret

if TYPE_CHECKING:
    from m3ad_client.station.metrics import Metrics


def open_metrics(settings: config.Config, status: Callable[[], dict[str, Any]]) -> "Metrics | None":
    """What counts for Prometheus; None without a page, as nobody could read it.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """
    if settings.page is None:
        return None
    for module in ("fastapi", "prometheus_client"):
        needed(module)
    from m3ad_client.station.metrics import Metrics

    return Metrics(settings, status)


class Web:
    """A page that is served while it is open.

    Args:
        settings: the station's configuration, with a page.
        ledger: an own connection; closed with the page.
        lines: the cameras.
        status: faults and queues.
        stop: set when the station ends.
        metrics: what Prometheus reads.

    Raises:
        ArtifactError: the port is taken, or the token or the certificate cannot be read.
        MissingDependencyError: a package of the extra `station` is not installed.
    """

    def __init__(
        self,
        settings: config.Config,
        ledger: Ledger,
        lines: list[Line],
        status: Callable[[], dict[str, Any]],
        stop: threading.Event,
        metrics: "Metrics | None",
    ) -> None:
        page = settings.page
        assert page is not None
        self.ledger = ledger
        for module in ("fastapi", "jinja2", "python_multipart"):
            needed(module)
        uvicorn = needed("uvicorn")
        from m3ad_client.station.metrics import add_metrics
        from m3ad_client.station.page import create_app
        from m3ad_client.station.view import View

        token = read_secret(page.token_file) if page.token_file else None
        view = View(settings, ledger, {line.camera.name: line for line in lines}, status, stop, token)
        app = create_app(view)
        if metrics is not None:
            add_metrics(app, metrics)
        options: dict[str, Any] = {
            "log_level": "warning",
            "timeout_graceful_shutdown": 2,
            "server_header": False,
        }
        if page.cert:
            options |= {"ssl_certfile": str(page.cert), "ssl_keyfile": str(page.key)}
        served = uvicorn.Config(app, **options)
        try:
            served.load()
        except OSError as error:
            raise ArtifactError(
                f"{page.cert} and {page.key} are no certificate with its key ({error})"
            ) from error
        self.server = uvicorn.Server(served)
        family = socket.AF_INET6 if ":" in page.host else socket.AF_INET
        try:
            self.socket = socket.create_server((page.host, page.port), family=family)
        except OSError as error:
            raise ArtifactError(
                f"the page cannot listen at {page.host}:{page.port} ({error.strerror}); give [page] another port"
            ) from error
        # asyncio does so for sockets that name their protocol alone; without, each page takes 40 ms more.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = self.socket.getsockname()[1]
        self.url = f"{'https' if page.cert else 'http'}://{f'[{page.host}]' if ':' in page.host else page.host}:{port}/"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def start(self) -> None:
        """Serve."""
        self.thread.start()

    def end(self) -> None:
        """End after the answers that are under way."""
        self.server.should_exit = True
        if self.thread.is_alive():
            self.thread.join()
        self.socket.close()
        self.ledger.close()
