"""A plant that listens: a web server that goes and comes, and a broker with a subscriber that misses nothing."""

import getpass
import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BROKER = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Plant:
    """A web server that keeps what it was sent."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.port = free_port()
        self.server: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        """Answer."""
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Be gone."""
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


class Broker:
    """A mosquitto that keeps its subscriber's messages while either is away, and the subscriber."""

    def __init__(self, folder: Path) -> None:
        import paho.mqtt.client as mqtt

        self.port, self.told = free_port(), []  # type: ignore[var-annotated]
        self.conf = folder / "mosquitto.conf"
        self.conf.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {folder}/\nuser {getpass.getuser()}\nmax_queued_messages 0\n"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="plant", clean_session=False)
        self.client.on_message = lambda _c, _d, message: self.told.append(json.loads(message.payload))
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.reconnect_delay_set(1, 2)
        self.client.connect("127.0.0.1", self.port)
        self.client.subscribe("m3ad/+/verdict", qos=1)
        self.client.loop_start()
        assert ready.wait(20)

    def start(self) -> None:
        """Answer."""
        self.process = subprocess.Popen([str(BROKER), "-c", str(self.conf)], stderr=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("mosquitto does not answer")

    def stop(self) -> None:
        """End it in order, as it writes what it holds only then."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End both."""
        self.client.disconnect()
        self.client.loop_stop()
        self.stop()
