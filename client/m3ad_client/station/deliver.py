"""Gives a sink its verdicts, the oldest first, until it takes each; the queue is in the ledger."""

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

from m3ad.errors import M3adError
from m3ad.ledger import Delivery, Ledger

from m3ad_client.station import sink_tables
from m3ad_client.station.faults import Faults
from m3ad_client.station.line import back_off
from m3ad_client.station.sinks import files
from m3ad_client.station.sinks.answers import Refused
from m3ad_client.station.sinks.event import event
from m3ad_client.station.sinks.mqtt import Mqtt
from m3ad_client.station.sinks.opcua import OpcUa
from m3ad_client.station.sinks.webhook import Webhook


class Sink(Protocol):
    """Who is told."""

    def send(self, event: dict[str, Any]) -> None:
        """Tell one verdict; it is taken when this returns.

        Raises:
            OSError, M3adError: not now (`NotNow`).
            Refused: never.
        """

    def close(self) -> None:
        """Close what is open."""


def open_sink(settings: sink_tables.Sink, station: str) -> Sink:
    """The sink of a configuration's table.

    Raises:
        ArtifactError: a file that it names cannot be used.
        MissingDependencyError: a package of the extra `station` or `opcua` is not installed.
    """
    if isinstance(settings, sink_tables.JsonLines):
        return files.json_lines(settings.path)
    if isinstance(settings, sink_tables.Csv):
        return files.csv_rows(settings.path)
    if isinstance(settings, sink_tables.OpcUa):
        return OpcUa(settings, station)
    return (
        Webhook(settings, station) if isinstance(settings, sink_tables.Webhook) else Mqtt(settings, station)
    )


@dataclass
class Deliverer:
    """One sink's queue; `run` is its thread."""

    name: str
    sink: Sink
    ledger: Ledger
    faults: Faults
    stop: threading.Event
    wake: threading.Event = field(default_factory=threading.Event)
    failures: int = 0

    def run(self) -> None:
        """Deliver until the station ends."""
        while not self.stop.is_set():
            self.wake.clear()
            wait_s = self.attempt()
            if wait_s:
                # A sink that is down is left alone for a while, however many new verdicts there are.
                (self.stop if self.failures else self.wake).wait(wait_s)
        self.sink.close()

    def attempt(self) -> float:
        """Deliver the next verdict; the seconds to wait before another try, 0 where one was delivered."""
        place = f"sink {self.name}"
        try:
            waiting = self.ledger.next_delivery(self.name)
            if waiting is None:
                self.faults.clear(place)
                return 1.0
            self._deliver(waiting)
        except (M3adError, OSError) as error:
            self.failures += 1
            told = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)  # type: ignore[union-attr]
            self.faults.set(place, f"{told} (verdicts wait and are sent again)")
            return back_off(self.failures)
        self.failures = 0
        self.faults.clear(place)
        return 0.0

    def _deliver(self, waiting: Delivery) -> None:
        part = self.ledger.part(waiting.part)
        assert part is not None, "a delivery has its part"
        told = event(part, {} if part.setup is None else self.ledger.setup(part.setup))
        try:
            self.sink.send(told)
        except Refused as error:
            self.ledger.gave_up(waiting.id, str(error))
        else:
            self.ledger.delivered(waiting.id)
