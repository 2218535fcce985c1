"""Frames through a folder, a station and three sinks, with a fault every so many frames: is each part there once?

Two cameras: `left` is judged in the station's process, `right` by a real Triton. What each camera says of a frame the
first time, it must say for ever; `left` must say what `Inspector` says.
"""

import contextlib
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soak_parts as parts
from m3ad.bundle import Bundle, sha256_of
from m3ad.ledger import Ledger
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.repository import write_repository
from serving import make_frame, write_frame
from soak_sinks import BROKER, Broker, Plant

CAMERAS = ("left", "right")
MOST_WAITING = 20  # frames in a camera's folder
OUTAGE_S = 3.0  # that something is gone for
CLOCK = 4  # of the faults
TINY_FILE = 16_384  # bytes that no file may exceed where there is no room
CONFIG = """
[station]
folder = "station"
keep_gib = 0.05

[[camera]]
name = "left"
folder = "left"
done_marker = true
bundle = "{bundle}"
threads = 1

[[camera]]
name = "right"
folder = "right"
settle_s = 0.05
url = "{url}"

[[sink]]
kind = "jsonl"
name = "lines"
path = "verdicts.jsonl"

[[sink]]
kind = "webhook"
name = "plant"
url = "http://127.0.0.1:{plant}/verdicts"
secret_file = "secret"
timeout_s = 5
"""
MQTT = """
[[sink]]
kind = "mqtt"
name = "broker"
host = "127.0.0.1"
port = {port}
"""


class Soak:
    """One run in a folder of its own.

    Args:
        folder: empty.
        bundle: of the parts' detector.
        seed: of the frames.
    """

    def __init__(self, folder: Path, bundle: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.result, self.memory = parts.Result("station"), parts.Memory()
        self.faults: Counter[str] = Counter()
        self.bad: set[str] = set()
        self.over: list[tuple[float, Callable[[], None]]] = []  # when a fault ends, and how
        self.wanted = 0  # the index of the next frame
        self.clock, self.jumps = folder / "clock", itertools.cycle((86_400.0, -86_400.0))
        self.clock.write_text("0")
        self.bundle = bundle
        self.pool = [self._written(i, frame) for i, frame in enumerate(parts.frames(seed))]
        self.station: subprocess.Popen[str] | None = None
        self.log = (folder / "station.log").open("w")
        print("-" * TINY_FILE, file=self.log, flush=True)  # so that there is no room for the log either

    def _written(self, number: int, frame: Any) -> tuple[Path, Path]:
        return write_frame(self.folder / "pool", str(number), frame)

    def run(self, pace: parts.Pace) -> parts.Result:
        """Everything; the table's rows and what is wrong."""
        repository = self.folder / "repository"
        write_repository(self.bundle, repository, "onnxruntime", "fused")
        plant, broker = Plant(), Broker(self.folder) if BROKER else None
        try:
            with parts.serving(repository, self.folder / "serve.log") as (serve, told):
                text = CONFIG.format(bundle=self.bundle, url=told["grpc_url"], plant=plant.port)
                text += MQTT.format(port=broker.port) if broker else ""
                (self.folder / "station.toml").write_text(text)
                (self.folder / "secret").write_text("0123456789abcdef-secret")
                for camera in CAMERAS:
                    for kind in ("rgb", "xyz"):
                        (self.folder / camera / kind).mkdir(parents=True)
                self._start()
                self._feed(pace, plant, broker, serve.pid)
                self._settle()
                assert self.station is not None
                self.station.terminate()
                code = self.station.wait(60)
                self.result.require(code == 143, f"the station ended with {code}, expected 143 after SIGTERM")
                if broker:
                    self._until(lambda: len({e["id"] for e in broker.told}) >= self.wanted, 30)
        finally:
            if self.station and self.station.poll() is None:
                self.station.kill()
                self.station.wait()
            plant.stop()
            if broker:
                broker.close()
            self.log.close()
        lines = (self.folder / "verdicts.jsonl").read_text().splitlines()
        sinks = {"lines": [json.loads(line) for line in lines], "webhook": plant.told}
        self._judge(sinks | ({"mqtt": broker.told} if broker else {}))
        return self.result

    def _start(self) -> None:
        command = [sys.executable, Path(__file__).with_name("soak_clock.py"), self.clock, "station"]
        self.station = subprocess.Popen(
            [*command, self.folder / "station.toml"], stdout=self.log, stderr=self.log, text=True
        )

    def _feed(self, pace: parts.Pace, plant: Plant, broker: Broker | None, serve: int) -> None:
        faults = self._faults(plant, broker, serve)
        for n in pace:
            if turn := pace.turn(n):
                # Killed in the first half alone: a process must live long enough to tell whether it grows.
                chosen = (turn - 1) % len(faults)
                chosen = chosen if chosen or pace.share(n) < 0.5 else CLOCK
                self.faults[faults[chosen]()] += 1
            self._put(CAMERAS[n % 2], f"{n:06}", self.pool[n // 2 % len(self.pool)])
            if n % 10 == 9:
                assert self.station is not None
                self.memory.look("station", [self.station.pid])

    def _end_faults(self) -> None:
        for entry in [entry for entry in self.over if entry[0] <= time.monotonic()]:
            self.over.remove(entry)
            entry[1]()

    def _put(self, camera: str, name: str, files: tuple[Path, Path]) -> None:
        """Lay a frame into a camera's folder once there are not too many; the marker comes last."""
        folder = self.folder / camera
        self._end_faults()
        self._until(lambda: len(list((folder / "rgb").iterdir())) < MOST_WAITING, 300)
        for source, kind in zip(files, ("rgb", "xyz"), strict=True):
            shutil.copyfile(source, folder / kind / f"{name}{source.suffix}")
        (folder / f"{name}.done").touch() if camera == "left" else None
        self.wanted += 1

    def _faults(self, plant: Plant, broker: Broker | None, serve: int) -> list[Callable[[], str]]:
        def later(end: Callable[[], None]) -> None:
            self.over.append((time.monotonic() + OUTAGE_S, end))

        def killed() -> str:
            assert self.station is not None
            self.station.kill()
            self.station.wait()
            self._start()
            return "station killed (SIGKILL)"

        def webhook_down() -> str:
            plant.stop()
            later(plant.start)
            return "webhook's server down"

        def broker_down() -> str:
            if broker is None:
                return webhook_down()
            broker.stop()
            later(broker.start)
            return "broker down"

        def jumped() -> str:
            self.clock.write_text(str(next(self.jumps) + float(self.clock.read_text())))
            self._signal(signal.SIGUSR1)
            return "clock a day on or back"

        def no_room() -> str:
            self._limit(TINY_FILE)
            later(lambda: self._limit(resource.RLIM_INFINITY))
            return f"no file above {TINY_FILE >> 10} KiB (RLIMIT_FSIZE)"

        return [
            killed,
            lambda: parts.hit(serve, "", signal.SIGKILL),
            lambda: self._bad_frames(),
            webhook_down,
            jumped,
            no_room,
            broker_down,
            lambda: parts.hit(serve, "tiny_head", signal.SIGKILL),
        ]

    def _signal(self, sent: signal.Signals) -> None:
        """To the station, once it takes signals: the file is read at its start, too."""
        assert self.station is not None
        status = Path(f"/proc/{self.station.pid}/status").read_text()
        caught = int(next(x for x in status.splitlines() if x.startswith("SigCgt")).split()[1], 16)
        if caught >> (sent - 1) & 1:
            self.station.send_signal(sent)

    def _limit(self, size: int) -> None:
        assert self.station is not None
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(self.station.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(self.station.pid, resource.RLIMIT_FSIZE, (size, hard))

    def _bad_frames(self) -> str:
        """A plate of too few points, half a picture, and a cloud that is none; each for both cameras."""
        folder = self.folder / "bad"
        few = write_frame(folder, "few", make_frame(self.wanted, 64, parts.BAD))
        half, none = folder / "half.png", folder / "none.tiff"
        rgb, xyz = self.pool[0]
        half.write_bytes(rgb.read_bytes()[: rgb.stat().st_size // 2])
        none.write_bytes(np.random.default_rng(self.wanted).bytes(5000))
        for number, files in enumerate((few, (half, xyz), (rgb, none))):
            for camera in CAMERAS:
                name = f"bad-{self.wanted:06}-{number}"
                self.bad.add(name)
                self._put(camera, name, files)
        return "six bad frames"

    def _settle(self) -> None:
        """Until everything is judged and told."""
        path = self.folder / "station" / "ledger.sqlite"
        with Ledger(path) as ledger:
            self._until(lambda: self._is_done(ledger), 300)

    def _is_done(self, ledger: Ledger) -> bool:
        done = ledger.query("SELECT count(*) FROM part WHERE state != 'taken'")[0][0]
        return not self.over and done >= self.wanted and not ledger.queues()

    def _until(self, what: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not what():
            self._end_faults()
            if time.monotonic() > end:
                log = (self.folder / "station.log").read_text()[-2000:]
                raise AssertionError(f"nothing moves since {seconds:.0f} s; the station's log ends: {log}")
            time.sleep(0.02)

    def _judge(self, sinks: dict[str, list[dict[str, Any]]]) -> None:
        result = self.result
        with Ledger(self.folder / "station" / "ledger.sqlite") as ledger:
            found, queues = ledger.parts(), ledger.queues()
        result.row("frames", f"{self.wanted}, {len(self.bad)} of them bad on purpose")
        result.row("faults", sum(self.faults.values()))
        for name, count in sorted(self.faults.items()):
            result.row(f"  {name}", count)
        times = Counter((part.camera, part.name) for part in found)
        lost, twice = self.wanted - len(times), len(found) - len(times)
        result.row("ledger: lost / twice", f"{lost} / {twice}")
        result.require(lost == twice == 0, f"the ledger lost {lost} parts and has {twice} twice")
        wrong = [p for p in found if (p.state == "fault") != (p.name in self.bad)]
        for part in wrong[:5]:
            result.wrong.append(f"part {part.name} of {part.camera} is {part.state}: {part.fault}")
        scores = defaultdict(set)
        for part in found:
            if part.name not in self.bad and part.state == "judged":
                scores[part.camera, int(part.name) // 2 % len(self.pool)].add((part.score, part.verdict))
        inspector = Inspector(Bundle.open(self.bundle), threads=1)
        for number, frame in enumerate(parts.frames(self.seed)):
            if ("left", number) in scores:
                scores["left", number].add((inspector.inspect(frame).score, inspector.inspect(frame).verdict))
        other = [key for key, told in scores.items() if len(told) != 1]
        result.row("wrong verdicts", len(wrong) + len(other))
        result.require(
            not other, f"frames {other} were judged in more than one way: {[scores[k] for k in other]}"
        )
        result.require(not wrong, f"{len(wrong)} parts are in a wrong state")
        known = {part.id: part for part in found}
        for name, told in sinks.items():
            first = list(dict.fromkeys(event["id"] for event in told))
            missing, again = len(known.keys() - {*first}), len(told) - len(first)
            result.row(f"{name}: missing / told again", f"{missing} / {again}")
            result.require(missing == 0 and {*first} <= known.keys(), f"{name} lacks {missing} parts")
            for camera in CAMERAS:
                order = [i for i in first if known[i].camera == camera]
                result.require(order == sorted(order), f"{name} was not told in order of {camera}")
            is_same = all(
                (e["score"], e["part"]) == (known[e["id"]].score, known[e["id"]].name) for e in told
            )
            result.require(is_same, f"{name} was told other than the ledger has")
        result.require(not queues, f"left in queues: {queues}")
        kept = [part for part in found if part.pictures]
        damaged = [p.name for p in kept if sha256_of(self.folder / "station" / p.rgb) != p.rgb_sha256]
        result.require(not damaged, f"kept files differ from what was judged: {damaged[:5]}")
        left = [p for p in self.folder.rglob("*") if p.is_file() and self._is_litter(p)]
        result.row("pictures kept / litter left", f"{len(kept)} parts / {len(left)} files")
        result.require(not left, f"files were left: {left[:5]}")
        self.memory.tell(result, ["station"])

    def _is_litter(self, path: Path) -> bool:
        inside = path.relative_to(self.folder).parts
        return inside[0] in CAMERAS or (inside[0] == "station" and path.name.startswith("."))
