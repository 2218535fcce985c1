"""Webhooks against a real HTTP server: what is signed, what is sent again, what becomes a dead letter."""

import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from m3ad.errors import ArtifactError
from m3ad.ledger import Ledger
from m3ad_client.station import deliver, sink_tables
from m3ad_client.station.faults import Faults
from m3ad_client.station.sinks.webhook import Webhook

SECRET = b"0123456789abcdef-secret"


class Plant:
    """A server that answers with the next of `answers`, then 200, and keeps what it was sent."""

    def __init__(self, port: int = 0) -> None:
        self.answers: list[int] = []
        self.sent: list[tuple[dict[str, str], bytes]] = []
        plant = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                plant.sent.append((dict(self.headers), body))
                self.send_response(plant.answers.pop(0) if plant.answers else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def ids(self) -> list[int]:
        return [json.loads(body)["id"] for _, body in self.sent]


@pytest.fixture
def plant() -> Iterator[Plant]:
    running = Plant()
    yield running
    running.close()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Callable[..., deliver.Deliverer]]:
    """A ledger with three faults for the sink `plant`, and who delivers them."""
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    ledger = Ledger(tmp_path / "l", create=True)
    for name in "abc":
        paths = (Path(f"{name}.png"), Path(f"{name}.tiff"))
        part = ledger.take(camera="left", name=name, sources=paths, hashes=(name * 64, name * 64), size=1)
        ledger.failed(part.id, "broken", ["plant"])
    opened = []

    def open_queue(port: int, **more: Any) -> deliver.Deliverer:
        url, secret = f"http://127.0.0.1:{port}/v", tmp_path / "secret"
        settings = sink_tables.Webhook(name="plant", url=url, secret_file=secret, timeout_s=5, **more)
        sink = Webhook(settings, "station", lambda: 1_790_000_000.9)
        opened.append(sink)
        return deliver.Deliverer("plant", sink, ledger, Faults(lambda _: None), threading.Event())

    yield open_queue
    for sink in opened:
        sink.close()
    ledger.close()


def drain(deliverer: deliver.Deliverer, most: int = 30) -> None:
    for _ in range(most):
        deliverer.attempt()


def test_each_verdict_is_signed_with_its_time(plant: Plant, queue: Callable[..., deliver.Deliverer]) -> None:
    drain(queue(plant.port))
    assert plant.ids == [1, 2, 3]
    for headers, body in plant.sent:
        want = hmac.new(SECRET, b"1790000000." + body, hashlib.sha256).hexdigest()
        assert headers["X-M3ad-Timestamp"] == "1790000000"
        assert headers["X-M3ad-Signature"] == f"sha256={want}"
        assert headers["Idempotency-Key"] == f"station/{json.loads(body)['id']}"
        assert json.loads(body)["format"] == "m3ad-verdict/1"


def test_trouble_is_waited_out_in_order(plant: Plant, queue: Callable[..., deliver.Deliverer]) -> None:
    plant.answers = [503, 429, 200, 500]
    deliverer = queue(plant.port)
    waits = [deliverer.attempt() for _ in range(7)]
    assert plant.ids == [1, 1, 1, 2, 2, 3]
    assert [wait > 0 for wait in waits] == [True, True, False, True, False, False, True]
    assert 0.25 <= waits[0] * 0.5 <= waits[1] <= 2  # doubled, with jitter of a half
    assert deliverer.ledger.queues() == {}


def test_what_is_refused_is_a_dead_letter_that_can_be_sent_again(
    plant: Plant, queue: Callable[..., deliver.Deliverer]
) -> None:
    plant.answers = [404, 500, 500, 500]
    deliverer = queue(plant.port, attempts=3)
    drain(deliverer)
    assert plant.ids == [1, 2, 2, 2, 3]
    dead = [row["dead"] for row in deliverer.ledger.query("SELECT dead FROM delivery ORDER BY id")]
    assert dead[0].endswith("/v answered 404")
    assert dead[1].endswith("/v answered 500 to the last of 3 attempts")
    assert deliverer.ledger.revive("plant") == 2
    drain(deliverer)
    assert plant.ids[5:] == [1, 2]
    assert deliverer.ledger.queues() == {}


def test_a_server_that_is_gone_never_makes_dead_letters(queue: Callable[..., deliver.Deliverer]) -> None:
    gone = Plant()
    gone.close()
    deliverer = queue(gone.port, attempts=1)
    drain(deliverer, 4)
    assert deliverer.ledger.queues() == {"plant": (3, 0)}
    assert "does not answer" in deliverer.faults.now()["sink plant"][0]
    back = Plant(gone.port)
    drain(deliverer)
    back.close()
    assert back.ids == [1, 2, 3]
    assert deliverer.faults.now() == {}


def test_secrets_that_are_none(tmp_path: Path) -> None:
    settings = sink_tables.Webhook(name="plant", url="http://a/", secret_file=tmp_path / "s")
    with pytest.raises(ArtifactError, match=r"cannot be read .*; write a secret into it"):
        Webhook(settings, "station")
    (tmp_path / "s").write_text("short\n")
    with pytest.raises(ArtifactError, match="holds 5 bytes, a secret needs 16: openssl rand"):
        Webhook(settings, "station")
