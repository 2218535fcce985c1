"""Fixtures of the station: its configuration over the tiny bundle, and frames that are put into its folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from m3ad.bundle import Bundle
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station
from serving import make_frame, write_frame

CONFIG = """
[station]
folder = "station"

[[camera]]
name = "left"
folder = "left"
settle_s = 0.02
bundle = "{bundle}"
threads = 1
{camera}

[[sink]]
kind = "jsonl"
name = "lines"
path = "verdicts.jsonl"

[[sink]]
kind = "csv"
name = "table"
path = "verdicts.csv"
{more}
"""


TOKEN = "a-token-for-the-tests-0123456789"
PAGE = '[page]\nport = 0\ntoken_file = "token"\n'


@pytest.fixture
def settings(tiny_bundle: Bundle, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration and its folders; `camera` stands in the camera's table, `more` at the end."""

    def write(camera: str = "", more: str = "") -> Path:
        (tmp_path / "left" / "rgb").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "station.toml"
        path.write_text(CONFIG.format(bundle=tiny_bundle.path, camera=camera, more=more))
        return path

    return write


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Puts frame number `seed` into a camera's folder."""

    def write(seed: int, camera: str = "left", name: str = "", part: float = 0.8) -> tuple[Path, Path]:
        return write_frame(tmp_path / camera, name or f"{seed:03}", make_frame(seed, part=part))

    return write


@pytest.fixture
def served(
    settings: Callable[..., Path], put: Callable[..., Any], tmp_path: Path
) -> Iterator[tuple[Station, httpx.Client]]:
    """A station that runs, with a defect, a good part and a bad frame judged."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    for seed, part in ((1, 0.8), (2, 0.8), (3, 0.1)):
        put(seed, part=part)
    station = Station(read_config(settings(camera="threshold = 0.0", more=PAGE)), lambda _: None)
    try:
        station.once()
        with station.running():
            assert station.web is not None
            with httpx.Client(base_url=station.web.url, timeout=60, trust_env=False) as client:
                yield station, client
    finally:
        station.close()
