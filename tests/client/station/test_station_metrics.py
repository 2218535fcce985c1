"""Metrics of a running station, scraped over HTTP and read by Prometheus' own parser, against the ledger."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from m3ad.bundle import Bundle
from m3ad_client.station.config import read_config
from m3ad_client.station.metrics import SHARES
from m3ad_client.station.station import Station
from prometheus_client.parser import text_string_to_metric_families
from stations import PAGE, TOKEN

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def scraped(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> Iterator[tuple[Station, httpx.Client]]:
    """A station with a sink that is down, two parts and a bad frame judged."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "verdicts.csv").mkdir()
    for seed, part in ((1, 0.8), (2, 0.8), (3, 0.1)):
        put(seed, part=part)
    station = Station(read_config(settings(camera="threshold = 1.0", more=PAGE)), lambda _: None)
    try:
        while len(station.ledger.parts("state != 'taken'")) < 3:
            station.lines[0].step()
        for deliverer in station.deliverers:
            for _ in range(4):
                deliverer.attempt()
        assert station.web is not None
        station.web.start()
        with httpx.Client(base_url=station.web.url, timeout=60, trust_env=False) as client:
            yield station, client
    finally:
        station.close()


def scrape(client: httpx.Client) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"m3ad_station_{name}", tuple(sorted(labels.items()))]


def test_what_is_scraped_is_what_the_ledger_has(
    scraped: tuple[Station, httpx.Client], tiny_bundle: Bundle
) -> None:
    station, client = scraped
    now = scrape(client)
    parts = station.ledger.parts()
    words = [part.verdict or "fault" for part in parts]
    assert len(words) == 3
    for word in ("good", "review", "defect", "fault"):
        assert of(now, "parts_total", camera="left", verdict=word) == words.count(word), word
    scores = np.array([part.score for part in parts if part.score is not None])
    for share in SHARES:
        below = of(now, "score_share_bucket", camera="left", le=str(share))
        assert below == np.count_nonzero(scores <= share), share
    assert of(now, "score_share_sum", camera="left") == pytest.approx(scores.sum())
    assert of(now, "last_score", camera="left") == scores[-1]
    assert of(now, "limit", camera="left", limit="reject") == 1.0
    assert of(now, "last_judged_seconds", camera="left") == pytest.approx(parts[-1].judged_at, abs=1)
    for step in ("read", "inspect", "save", "write"):
        assert of(now, "step_seconds_count", camera="left", step=step) == 2
    took = of(now, "step_seconds_sum", camera="left", step="read")
    took += of(now, "step_seconds_sum", camera="left", step="inspect")
    assert took * 1e3 == pytest.approx(sum(part.inspect_ms or 0 for part in parts), abs=0.01)
    stages = {dict(labels)["stage"] for name, labels in now if name == "m3ad_station_stage_seconds_count"}
    assert stages == {step.stage for step in tiny_bundle.contract.steps("fused")}


def test_queues_and_faults_are_those_of_the_moment(scraped: tuple[Station, httpx.Client]) -> None:
    station, client = scraped
    now = scrape(client)
    assert of(now, "queue", sink="lines", state="waiting") == 0
    assert of(now, "queue", sink="table", state="waiting") == 3
    assert of(now, "queue", sink="table", state="dead") == 0
    assert of(now, "fault", place="sink table") == 1
    assert of(now, "faults_total") == 1
    station.ledger.gave_up(station.ledger.next_delivery("table").id, "never")  # type: ignore[union-attr]
    station.faults.clear("sink table")
    now = scrape(client)
    assert of(now, "queue", sink="table", state="waiting") == 2
    assert of(now, "queue", sink="table", state="dead") == 1
    assert not any(name == "m3ad_station_fault" for name, _ in now)
    assert of(now, "faults_total") == 1
    assert of(now, "disk_free_bytes") > 0
    assert now["process_resident_memory_bytes", ()] > 0


def test_every_expression_of_the_dashboard_names_metrics_that_there_are(
    scraped: tuple[Station, httpx.Client],
) -> None:
    station, client = scraped
    station.lines[0].drift.shares = {"focus": 0.5}
    answer = client.get("/static/grafana.json")
    dashboard = json.loads(answer.text)
    now = scrape(client)
    assert of(now, "drift", camera="left", reason="focus") == 0.5
    known = {name for name, _ in now}
    labels: dict[str, set[str]] = {}
    for name, pairs in now:
        labels.setdefault(name, set()).update(key for key, _ in pairs)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(expressions) > 12
    named = {name for text in expressions for name in re.findall(r"\b(?:m3ad|process)_\w+", text)}
    assert named - known == set()
    ends = re.compile("_(total|bucket|count|sum|created)$")
    own = {ends.sub("", name) for name in known if name.startswith("m3ad_")}
    assert own == {
        ends.sub("", name) for name in named if name.startswith("m3ad_")
    }  # nothing that nobody sees
    for text in expressions:
        for name, chosen in re.findall(r"\b((?:m3ad|process)_\w+)\{([^}]*)\}", text):
            keys = set(re.findall(r"(\w+)=", chosen)) - {"job"}
            assert keys <= labels[name], text


def test_without_a_page_nothing_is_counted(settings: Callable[..., Path]) -> None:
    station = Station(read_config(settings()), lambda _: None)
    assert station.web is None
    station.close()
