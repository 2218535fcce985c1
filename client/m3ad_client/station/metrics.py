"""What Prometheus reads of a station at `/metrics` of its page, and what the dashboard `static/grafana.json` shows."""

import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from m3ad_client.station import config
from m3ad_client.station.seen import Seen

# Shares of the limit of reject, so that one histogram serves cameras and bundles whose scores are of another size.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
VERDICTS = ("good", "review", "defect", "fault")
Status = Callable[[], dict[str, Any]]


class Metrics:
    """A station's metrics; counters start at zero with the process, as Prometheus expects.

    Args:
        settings: the station's configuration.
        status: faults, queues and what waits, see `Station.status`.
    """

    def __init__(self, settings: config.Config, status: Status) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "m3ad_station"}
        self.parts = Counter(
            "parts", "Parts judged, by verdict; fault: it has none", ["camera", "verdict"], **kept
        )
        self.score = Histogram(
            "score_share",
            "Scores over the limit of reject, where that is positive",
            ["camera"],
            buckets=SHARES,
            **kept,
        )
        self.last = Gauge("last_score", "Score of the last part", ["camera"], **kept)
        self.judged = Gauge(
            "last_judged_seconds", "When a part was last judged, since 1970", ["camera"], **kept
        )
        self.limit = Gauge("limit", "What scores are held against", ["camera", "limit"], **kept)
        self.steps = Histogram(
            "step_seconds", "Steps of a part's way", ["camera", "step"], buckets=SECONDS, **kept
        )
        self.stages = Histogram(
            "stage_seconds",
            "Stages of the detector, in process",
            ["camera", "stage"],
            buckets=SECONDS,
            **kept,
        )
        info = Gauge(
            "info", "The station, and the version of m3ad that runs it", ["station", "version"], **kept
        )
        info.labels(settings.store.name, version("m3ad")).set(1)
        for camera in settings.cameras:  # what is zero is told, so that a first defect is a step up from it
            for verdict in VERDICTS:
                self.parts.labels(camera.name, verdict)
            self.score.labels(camera.name)
        ProcessCollector(registry=self.registry)
        self.registry.register(_Now(settings, status))

    def seen(self, part: Seen) -> None:
        """Count a part."""
        self.parts.labels(part.camera, part.verdict).inc()
        self.judged.labels(part.camera).set_to_current_time()
        if part.score is None or part.limits is None:
            return
        self.last.labels(part.camera).set(part.score)
        for name in ("reject", "review"):
            if (value := getattr(part.limits, name)) is not None:
                self.limit.labels(part.camera, name).set(value)
        if part.limits.reject > 0:
            self.score.labels(part.camera).observe(part.score / part.limits.reject)
        for name, seconds in part.step_s.items():
            self.steps.labels(part.camera, name).observe(seconds)
        for name, milliseconds in part.stage_ms.items():
            self.stages.labels(part.camera, name).observe(milliseconds / 1e3)


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    """Add the route /metrics."""

    @app.get("/metrics")
    def scrape(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"Content-Type": kind})


class _Now(Collector):
    """What is looked up when it is asked for."""

    def __init__(self, settings: config.Config, status: Status) -> None:
        self.settings, self.status = settings, status

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the ledger."""
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self.status()
        queue = GaugeMetricFamily(
            "m3ad_station_queue",
            "Verdicts that a sink has not taken; dead: it will not",
            labels=["sink", "state"],
        )
        for sink in self.settings.sinks:
            counts = now["queues"].get(sink.name, {"waiting": 0, "dead": 0})
            for state, count in counts.items():
                queue.add_metric([sink.name, state], count)
        waiting = GaugeMetricFamily(
            "m3ad_station_frames_waiting", "Frames that are not whole yet", labels=["camera"]
        )
        again = CounterMetricFamily(
            "m3ad_station_frames_again", "Frames that came again and were not judged again", labels=["camera"]
        )
        drift = GaugeMetricFamily(
            "m3ad_station_drift",
            "How far the last frames lie off the calibration frames, over what is tolerated",
            labels=["camera", "reason"],
        )
        for camera, counts in now["cameras"].items():
            for reason, share in counts["drift"].items():
                drift.add_metric([camera, reason], share)
            waiting.add_metric([camera], counts["waiting"])
            again.add_metric([camera], counts["seen_again"])
        faults = GaugeMetricFamily(
            "m3ad_station_fault", "What is wrong now, by its place; the page says why", labels=["place"]
        )
        for place in now["faults"]:
            faults.add_metric([place], 1)
        count = CounterMetricFamily("m3ad_station_faults", "Faults that came", value=now["fault_count"])
        free = GaugeMetricFamily(
            "m3ad_station_disk_free_bytes",
            "Room where the station keeps everything",
            value=shutil.disk_usage(self.settings.store.folder).free,
        )
        return queue, waiting, again, drift, faults, count, free
