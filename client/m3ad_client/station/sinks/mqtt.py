"""Verdicts by MQTT 3.1.1, quality of service 1: a verdict is told when the broker has acknowledged it.

PREFIX/CAMERA/verdict has every verdict, PREFIX/CAMERA/last retains the last one, PREFIX/state retains `online`, and
`offline` by the broker's own hand when the station is gone.
"""

import json
import threading
from typing import Any

from m3ad_client.station import sink_tables
from m3ad_client.station.needs import needed
from m3ad_client.station.sinks.answers import NotNow
from m3ad_client.station.sinks.webhook import read_secret

ONLINE, OFFLINE = "online", "offline"


class Mqtt:
    """A broker; the connection is made, and made again, in a thread of paho's.

    Raises:
        ArtifactError: the password's file cannot be read.
        MissingDependencyError: paho-mqtt is not installed.
    """

    def __init__(self, settings: sink_tables.Mqtt, station: str) -> None:
        self.settings = settings
        mqtt = needed("paho.mqtt.client")
        self.connected = threading.Event()
        self.why = "no answer yet"
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"m3ad-{station}-{settings.name}"
        )
        if settings.username is not None:
            password = read_secret(settings.password_file).decode() if settings.password_file else None
            self.client.username_pw_set(settings.username, password)
        if settings.tls:
            self.client.tls_set(ca_certs=None if settings.ca is None else str(settings.ca))
        self.client.will_set(f"{settings.prefix}/state", OFFLINE, qos=1, retain=True)
        self.client.reconnect_delay_set(1, 30)
        self.client.on_connect, self.client.on_disconnect = self._on_connect, self._on_disconnect
        self.client.connect_async(settings.host, settings.port)
        self.client.loop_start()

    def send(self, event: dict[str, Any]) -> None:
        """Publish one verdict and wait for the acknowledgement.

        Raises:
            NotNow: the broker is not there, or does not acknowledge in time.
        """
        place = f"{self.settings.host}:{self.settings.port}"
        if not self.connected.wait(self.settings.timeout_s):
            raise NotNow(f"no broker at {place} ({self.why})")
        text = json.dumps(event, allow_nan=False)
        topic = f"{self.settings.prefix}/{event['camera']}"
        sent = [
            self.client.publish(f"{topic}/{end}", text, qos=1, retain=end == "last")
            for end in ("verdict", "last")
        ]
        for message in sent:
            try:
                message.wait_for_publish(self.settings.timeout_s)
            except (RuntimeError, ValueError) as error:
                raise NotNow(f"the broker at {place} took no message ({error})") from error
            if not message.is_published():
                raise NotNow(f"the broker at {place} did not acknowledge in {self.settings.timeout_s:g} s")

    def close(self) -> None:
        """Say that the station is offline, and go."""
        if self.connected.is_set():
            state = self.client.publish(f"{self.settings.prefix}/state", OFFLINE, qos=1, retain=True)
            state.wait_for_publish(1.0)
        self.client.disconnect()
        self.client.loop_stop()

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.why = str(reason)
            return
        client.publish(f"{self.settings.prefix}/state", ONLINE, qos=1, retain=True)
        self.connected.set()

    def _on_disconnect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.connected.clear()
        self.why = str(reason)
