"""How long the station's page takes with many parts: python list_time.py [PARTS] prints a line for each page.

The pages come from the real server over HTTP; the ratio is to the same page of an empty ledger.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from m3ad.ledger import Ledger
from m3ad_client.station.config import read_config
from m3ad_client.station.station import Station

CONFIG = """
[station]
folder = "station"
[page]
port = 0
[[camera]]
name = "left"
folder = "left"
url = "localhost:1"
"""
PAGES = {
    "wall": "/",
    "list": "/parts",
    "list, middle": "/parts?before={half}",
    "list, open": "/parts?verdict=open",
    "list, scores": "/parts?least=0.99&camera=left",
    "list, nothing": "/parts?least=2",
    "one part": "/parts/{half}",
    "scores": "/scores",
    "status": "/api/status",
}


def fill(ledger: Ledger, count: int) -> None:
    """Parts of a line: 2 % defects, 5 % to be looked at again, half of those reviewed."""
    setup = ledger.setup_id({"limits": {"reject": 0.98, "review": 0.93}, "runtime": "none"})
    scores = np.random.default_rng(0).random(count)
    rows = []
    for n, score in enumerate(scores):
        verdict = "defect" if score > 0.98 else "review" if score > 0.93 else "good"
        said = "good" if verdict != "good" and n % 2 else None
        names = (
            f"{n:06}",
            f"{n:064x}",
            f"{n:064x}",
            f"/in/{n}.png",
            f"/in/{n}.tiff",
            f"f/{n}.png",
            f"f/{n}.tiff",
        )
        rows.append(("left", *names, 0, 1000, "judged", n, n + 0.1, 80.0, setup, score, verdict, "[]", said))
    keys = "camera, name, rgb_sha256, xyz_sha256, rgb_from, xyz_from, rgb, xyz, pictures, bytes, state, taken_at, "
    keys += "judged_at, inspect_ms, setup, score, verdict, defects, said"
    with ledger.transaction() as db:
        db.executemany(f"INSERT INTO part ({keys}) VALUES ({', '.join('?' * 19)})", rows)


def times(count: int) -> dict[str, float]:
    """Milliseconds of each page, the median of nine."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "left").mkdir()
        (folder / "station.toml").write_text(CONFIG)
        station = Station(read_config(folder / "station.toml"), lambda _: None)
        try:
            fill(station.ledger, count)
            with (
                station.running(),
                httpx.Client(base_url=station.web.url, timeout=60, trust_env=False) as client,
            ):  # type: ignore[union-attr]
                found = {}
                for name, path in PAGES.items():
                    taken = []
                    for _ in range(10):
                        started = time.perf_counter()
                        answer = client.get(path.format(half=max(1, count // 2)))
                        taken.append((time.perf_counter() - started) * 1e3)
                        assert answer.status_code == 200 or (not count and name == "one part"), answer.text
                    found[name] = median(taken[1:])
                return found
        finally:
            station.close()


if __name__ == "__main__":
    parts = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    empty, full = times(0), times(parts)
    for name, taken in full.items():
        ratio = (
            ""
            if name == "one part"
            else f", {taken / empty[name]:.1f} times an empty ledger's {empty[name]:.1f} ms"
        )
        print(f"{name:14} {taken:6.1f} ms of {parts} parts{ratio}")
