"""Fixtures of the station: its configuration over the tiny bundle, and frames that are put into its folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from m3ad.bundle import Bundle
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
