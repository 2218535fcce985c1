"""MQTT against a real mosquitto: acknowledged verdicts, retained state, a broker that goes and comes."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from m3ad_client.station import sink_tables
from m3ad_client.station.sinks.answers import NotNow
from m3ad_client.station.sinks.mqtt import Mqtt

BROKER = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(
    BROKER is None, reason="mosquitto is not installed: apt-get install mosquitto"
)


class Broker:
    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.conf = folder / "mosquitto.conf"
        self.conf.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([str(BROKER), "-c", str(self.conf)], stderr=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


class Plant:
    """A subscriber of everything."""

    def __init__(self, port: int) -> None:
        import paho.mqtt.client as mqtt

        self.got: list[tuple[str, str, bool]] = []
        self.ready = threading.Event()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self.client.on_message = lambda c, d, m: self.got.append(
            (m.topic, m.payload.decode(), bool(m.retain))
        )
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.connect("127.0.0.1", port)
        self.client.subscribe("#", qos=1)
        self.client.loop_start()
        assert self.ready.wait(10)

    def of(self, topic: str) -> list[Any]:
        return [json.loads(text) if text[0] == "{" else text for at, text, _ in self.got if at == topic]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def until(what: Callable[[], Any]) -> None:
    for _ in range(400):
        if what():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass in 8 s")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path)
    running.start()
    yield running
    running.stop()


def event(number: int) -> dict[str, Any]:
    return {"id": number, "camera": "left", "verdict": "good"}


def test_verdicts_are_acknowledged_and_the_last_is_retained(broker: Broker) -> None:
    plant = Plant(broker.port)
    sink = Mqtt(sink_tables.Mqtt(name="plc", host="127.0.0.1", port=broker.port, prefix="hall/3"), "station")
    for number in (1, 2):
        sink.send(event(number))
    until(lambda: len(plant.of("hall/3/left/verdict")) == 2)
    assert [e["id"] for e in plant.of("hall/3/left/verdict")] == [1, 2]
    late = Plant(broker.port)
    until(lambda: len(late.got) == 2)
    assert all(retained for *_, retained in late.got)
    assert late.of("hall/3/left/last") == [event(2)]
    assert late.of("hall/3/state") == ["online"]
    sink.close()
    until(lambda: late.of("hall/3/state")[-1] == "offline")
    plant.close()
    late.close()


def test_a_broker_that_is_gone_is_waited_for_and_a_dead_station_is_offline(broker: Broker) -> None:
    settings = sink_tables.Mqtt(name="plc", host="127.0.0.1", port=broker.port, timeout_s=0.3)
    sink = Mqtt(settings, "station")
    until(sink.connected.is_set)
    broker.stop()
    until(lambda: not sink.connected.is_set())
    with pytest.raises(NotNow, match=r"no broker at 127\.0\.0\.1"):
        sink.send(event(1))
    broker.start()
    until(sink.connected.is_set)
    plant = Plant(broker.port)
    sink.send(event(1))
    until(lambda: plant.of("m3ad/left/verdict") == [event(1)])
    sink.client.socket().shutdown(socket.SHUT_RDWR)  # as a station that was killed: no goodbye
    until(lambda: "offline" in plant.of("m3ad/state"))
    sink.close()
    plant.close()
