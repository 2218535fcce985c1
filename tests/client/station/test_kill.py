"""kill -9 at every step of a frame's way: after the restart each frame is judged once, and every sink has it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m3ad.bundle import sha256_of
from m3ad.ledger import Ledger

# One process imports everything and forks: each child is a station that dies at one point, before or after it.
DRIVER = """
import os, signal, sys
from pathlib import Path
from m3ad.ledger import Ledger
from m3ad_client.station.config import read_config
from m3ad_client.station.sinks.files import LineFile
from m3ad_client.station.station import Station
from serving import make_frame, write_frame

POINTS = [(Ledger, "take", "after", 1), *((os, "replace", "before", n) for n in (1, 2, 3, 4)),
          (Ledger, "judged", "before", 1), (Ledger, "judged", "after", 1), (Ledger, "failed", "after", 1),
          (LineFile, "send", "after", 2)]

def deadly(owner, name, when, count):
    real, calls = getattr(owner, name), [0]
    def call(*arguments, **named):
        calls[0] += 1
        if when == "before" and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        value = real(*arguments, **named)
        if when == "after" and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    setattr(owner, name, call)

def run(config, kill):
    child = os.fork()
    if child == 0:
        if kill:
            deadly(*kill)
        station = Station(read_config(config), print)
        station.once()
        station.close()
        os._exit(0)
    return os.waitpid(child, 0)[1]

config, folder = Path(sys.argv[1]), Path(sys.argv[2])
for seed, point in enumerate(POINTS):
    write_frame(folder, f"{seed:03}", make_frame(seed, size=64))
    write_frame(folder, f"{seed:03}b", make_frame(seed, size=64, part=0.1))  # cannot be inspected
    print(*point[1:], run(config, point), flush=True)
print("last", "-", 0, run(config, None), flush=True)
"""


def test_killed_at_every_step_nothing_is_lost_or_judged_twice(
    settings: Callable[..., Path], tmp_path: Path
) -> None:
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tests)!r})\n{DRIVER}",
            settings(),
            tmp_path / "left",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends: list[list[Any]] = [text.split() for text in done.stdout.splitlines() if text.count(" ") == 3]
    killed = [end for end in ends if int(end[3]) == 9]
    assert len(killed) == len(ends) - 1 == 9, done.stdout
    assert ends[-1] == ["last", "-", "0", "0"], done.stderr
    with Ledger(tmp_path / "station" / "ledger.sqlite") as ledger:
        parts = ledger.parts()
        assert ledger.queues() == {}
    names = sorted(part.name for part in parts)
    assert names == sorted(f"{seed:03}{end}" for seed in range(9) for end in ("", "b"))
    assert {part.name[3:]: part.state for part in parts} == {"": "judged", "b": "fault"}
    assert {part.state for part in parts if part.name.endswith("b")} == {"fault"}
    for part in parts:
        kept = [tmp_path / "station" / name for name in (part.rgb, part.xyz)]
        assert [sha256_of(path) for path in kept] == [part.rgb_sha256, part.xyz_sha256]
    told = [json.loads(text) for text in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert {event["id"] for event in told} == {part.id for part in parts}
    verdicts = {event["id"]: (event["verdict"], event["score"]) for event in told}
    assert verdicts == {part.id: (part.verdict, part.score) for part in parts}
    first_told = list(dict.fromkeys(event["id"] for event in told))
    assert first_told == sorted(first_told)
    assert [p for p in (tmp_path / "left").rglob("*") if p.is_file()] == []
    hidden = [p for p in (tmp_path / "station").rglob(".*") if p.is_file()]
    assert hidden == []
