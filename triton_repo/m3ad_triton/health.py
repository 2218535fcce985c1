"""How a served line tells orchestrators that it is well, over HTTP."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from m3ad.errors import ServerError


class Health:
    """`GET /health`: 200 while all is well, 503 and a sentence while it is not. Nothing else is answered.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        problem: what is wrong now, or None.

    Raises:
        ServerError: the port cannot be taken.
    """

    def __init__(self, host: str, port: int, problem: Callable[[], str | None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wrong = problem()
                known = self.path == "/health"
                body = json.dumps({"ok": wrong is None, "problem": wrong}).encode() if known else b""
                self.send_response(404 if not known else 200 if wrong is None else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Say nothing: it is asked every few seconds."""

        try:
            self.server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ServerError(
                f"health port {port} on {host} cannot be taken ({error.strerror}); choose another: --health-port PORT"
            ) from error
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()
