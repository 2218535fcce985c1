"""The ledger of a station: which parts were seen, what was found, who was told, what people said of it. SQLite.

A part is written when its files are taken, before they are moved, and again when it is judged; both are transactions.
So whoever is killed at any moment, a part is judged once: one that was taken and not judged is what is left to do.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from m3ad.errors import ArtifactError
from m3ad.limits import Verdict

FORMAT = 0x6D336164  # `m3ad`, SQLite's application_id
VERSION = 1
State = Literal["taken", "judged", "fault"]
Said = Literal["good", "defect"]

SCHEMA = """
CREATE TABLE setup (id INTEGER PRIMARY KEY, record TEXT NOT NULL UNIQUE);
CREATE TABLE part (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    camera TEXT NOT NULL, name TEXT NOT NULL,
    rgb_sha256 TEXT NOT NULL, xyz_sha256 TEXT NOT NULL,
    rgb_from TEXT NOT NULL, xyz_from TEXT NOT NULL,
    rgb TEXT NOT NULL, xyz TEXT NOT NULL, pictures INTEGER NOT NULL DEFAULT 1, bytes INTEGER NOT NULL,
    state TEXT NOT NULL, starts INTEGER NOT NULL DEFAULT 0, taken_at REAL NOT NULL, judged_at REAL,
    inspect_ms REAL, setup INTEGER REFERENCES setup (id),
    score REAL, verdict TEXT, defects TEXT, largest_mm2 REAL,
    overlay TEXT, maps TEXT, not_saved TEXT, fault TEXT, said TEXT,
    UNIQUE (camera, name, rgb_sha256, xyz_sha256)
);
CREATE INDEX part_state ON part (state, camera);
CREATE INDEX part_pictures ON part (pictures, id);
CREATE TABLE delivery (
    id INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL, part INTEGER NOT NULL REFERENCES part (id), dead TEXT
);
CREATE INDEX delivery_sink ON delivery (sink, dead, id);
CREATE TABLE review (
    part INTEGER NOT NULL REFERENCES part (id), at REAL NOT NULL, by TEXT NOT NULL, said TEXT NOT NULL
);
"""

# What the page asks for, the newest first: none of it may read every part. Ledgers of before get them when a station
# opens them.
INDICES = """
CREATE INDEX IF NOT EXISTS part_camera ON part (camera);
CREATE INDEX IF NOT EXISTS part_verdict ON part (verdict);
CREATE INDEX IF NOT EXISTS part_open ON part (said) WHERE verdict IN ('review', 'defect');
CREATE INDEX IF NOT EXISTS part_fault ON part (state) WHERE state = 'fault'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part as the ledger has it.

    Attributes:
        rgb, xyz: where its files are kept, relative to the ledger's folder; `pictures` is False once they are removed.
        rgb_from, xyz_from: where they came from.
        bytes: of its files, with overlay and maps.
        state: `taken` and not judged yet, `judged`, or `fault`: it cannot be inspected, and `fault` says why.
        starts: how many times a station started and found it taken.
        taken_at, judged_at: seconds since 1970.
        inspect_ms: from the files to the verdict.
        setup: what judged it, see `Ledger.setup`.
        largest_mm2: area of its largest defect.
        maps: an .npz of `anomaly_map` [S, S] float32 and, where the bundle's runtime gives them, `score_maps`
            [n, S, S] float16 with their `names`.
        not_saved: why overlay and maps are not there.
        said: what a person said of it last.
    """

    id: int
    camera: str
    name: str
    rgb_sha256: str
    xyz_sha256: str
    rgb_from: str
    xyz_from: str
    rgb: str
    xyz: str
    pictures: bool
    bytes: int
    state: State
    starts: int
    taken_at: float
    judged_at: float | None
    inspect_ms: float | None
    setup: int | None
    score: float | None
    verdict: Verdict | None
    defects: list[dict[str, Any]] | None
    largest_mm2: float | None
    overlay: str | None
    maps: str | None
    not_saved: str | None
    fault: str | None
    said: Said | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A verdict that a sink has not been given yet; `dead` says why it was given up."""

    id: int
    sink: str
    part: int
    dead: str | None


class Ledger:
    """An open ledger; several threads may use one, several processes may each open theirs.

    Args:
        path: the file.
        create: make it where there is none.

    Raises:
        ArtifactError: here and in every method, the file cannot be read or written, or is something else.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder; name the ledger.sqlite in it")
        if not create and not path.is_file():
            raise ArtifactError(f"{path} does not exist; a ledger is written by `m3ad-client station`")
        self.path, self._lock = path, threading.RLock()
        with self._sentence():
            # Transactions are begun and ended here, not by the module.
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        with self.transaction() as db:
            if create and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {FORMAT}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            found = [
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            ]
        if found != [FORMAT, VERSION]:
            self.close()
            raise ArtifactError(
                f"{path} is no ledger of this m3ad (format {found[0]:#x}, version {found[1]}; expected {FORMAT:#x}, "
                f"{VERSION}); name the `ledger.sqlite` of a station"
            )
        if create:
            with self.transaction() as db:
                for statement in INDICES.split(";"):
                    db.execute(statement)
        with self._sentence():
            # A verdict that a plant was told must survive a power cut: each commit waits for the disk.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Close it."""
        self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of a block or nothing of it; it ends on the disk."""
        with self._lock, self._sentence():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back where the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def query(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a SELECT."""
        with self._lock, self._sentence():
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _sentence(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "not a database" in str(error):
                raise ArtifactError(
                    f"{self.path} is not a ledger ({error}); name the ledger.sqlite of a station's folder"
                ) from error
            raise ArtifactError(
                f"ledger {self.path} cannot be used ({error}); make room there, or look at the disk"
            ) from error

    # What a camera's line writes.

    def take(
        self, *, camera: str, name: str, sources: tuple[Path, Path], hashes: tuple[str, str], size: int
    ) -> Part:
        """Write that a frame was found, or return the part that it already is.

        Args:
            camera: its name.
            name: of the frame.
            sources: image and cloud, where they lie now.
            hashes: their sha256.
            size: their bytes together.
        """
        now = time.time()
        key = (camera, name, *hashes)
        with self.transaction() as db:
            select = "SELECT * FROM part WHERE camera = ? AND name = ? AND rgb_sha256 = ? AND xyz_sha256 = ?"
            if known := db.execute(select, key).fetchone():
                return _part(known)
            origins = [str(path) for path in sources]
            number = db.execute(
                "INSERT INTO part (camera, name, rgb_sha256, xyz_sha256, rgb_from, xyz_from, rgb, xyz, bytes, state, "
                "taken_at) VALUES (?, ?, ?, ?, ?, ?, '', '', ?, 'taken', ?)",
                (*key, *origins, size, now),
            ).lastrowid
            day = time.strftime("%Y-%m-%d", time.gmtime(now))
            kept = [
                f"frames/{camera}/{day}/{number:09}{i}{p.suffix.lower()}"
                for i, p in zip((".rgb", ".xyz"), sources, strict=True)
            ]
            db.execute("UPDATE part SET rgb = ?, xyz = ? WHERE id = ?", (*kept, number))
            return _part(db.execute("SELECT * FROM part WHERE id = ?", (number,)).fetchone())

    def begin(self, camera: str) -> None:
        """Count a start for the first part of a camera that was taken and not judged: the one that was being judged."""
        with self.transaction() as db:
            db.execute(
                "UPDATE part SET starts = starts + 1 WHERE id = (SELECT min(id) FROM part WHERE state = 'taken' AND "
                "camera = ?)",
                (camera,),
            )

    def unfinished(self, camera: str) -> list[Part]:
        """Parts that were taken and not judged, in order."""
        rows = self.query("SELECT * FROM part WHERE state = 'taken' AND camera = ? ORDER BY id", camera)
        return [_part(row) for row in rows]

    def setup_id(self, record: dict[str, Any]) -> int:
        """The number of what judges: bundle, limits, threshold card and runtime, written once."""
        text = json.dumps(record, sort_keys=True)
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO setup (record) VALUES (?)", (text,))
            return int(db.execute("SELECT id FROM setup WHERE record = ?", (text,)).fetchone()[0])

    def setup(self, number: int) -> dict[str, Any]:
        """What judged, as it was written."""
        (row,) = self.query("SELECT record FROM setup WHERE id = ?", number)
        return dict(json.loads(row["record"]))

    def judged(
        self,
        part: int,
        *,
        setup: int,
        score: float,
        verdict: Verdict,
        defects: Sequence[dict[str, Any]],
        inspect_ms: float,
        overlay: str | None = None,
        maps: str | None = None,
        extra_bytes: int = 0,
        not_saved: str | None = None,
        sinks: Sequence[str] = (),
    ) -> None:
        """Write a verdict and whom it is to be told, in one transaction; a part that has one keeps it."""
        areas = [defect["area_mm2"] for defect in defects if defect["area_mm2"] is not None]
        with self.transaction() as db:
            done = db.execute(
                "UPDATE part SET state = 'judged', judged_at = ?, setup = ?, score = ?, verdict = ?, defects = ?, "
                "largest_mm2 = ?, inspect_ms = ?, overlay = ?, maps = ?, bytes = bytes + ?, not_saved = ? "
                "WHERE id = ? AND state = 'taken'",
                (
                    *(
                        time.time(),
                        setup,
                        score,
                        verdict,
                        json.dumps(list(defects)),
                        max(areas, default=None),
                    ),
                    *(inspect_ms, overlay, maps, extra_bytes, not_saved, part),
                ),
            )
            if done.rowcount:
                _tell(db, part, sinks)

    def failed(self, part: int, why: str, sinks: Sequence[str] = ()) -> None:
        """Write that a part cannot be inspected."""
        with self.transaction() as db:
            done = db.execute(
                "UPDATE part SET state = 'fault', judged_at = ?, fault = ? WHERE id = ? AND state = 'taken'",
                (time.time(), why, part),
            )
            if done.rowcount:
                _tell(db, part, sinks)

    # What sinks read and write.

    def next_delivery(self, sink: str) -> Delivery | None:
        """The oldest verdict that a sink has not been given."""
        rows = self.query("SELECT * FROM delivery WHERE sink = ? AND dead IS NULL ORDER BY id LIMIT 1", sink)
        return Delivery(**rows[0]) if rows else None

    def delivered(self, delivery: int) -> None:
        """Strike a delivery off."""
        with self.transaction() as db:
            db.execute("DELETE FROM delivery WHERE id = ?", (delivery,))

    def gave_up(self, delivery: int, why: str) -> None:
        """Lay a delivery aside as a dead letter."""
        with self.transaction() as db:
            db.execute("UPDATE delivery SET dead = ? WHERE id = ?", (why, delivery))

    def revive(self, sink: str) -> int:
        """Queue a sink's dead letters again, at the end of its queue; their number."""
        with self.transaction() as db:
            parts = db.execute(
                "SELECT part FROM delivery WHERE sink = ? AND dead IS NOT NULL ORDER BY id", (sink,)
            ).fetchall()
            db.execute("DELETE FROM delivery WHERE sink = ? AND dead IS NOT NULL", (sink,))
            for row in parts:
                _tell(db, row["part"], (sink,))
        return len(parts)

    def queues(self) -> dict[str, tuple[int, int]]:
        """By sink, how many deliveries wait and how many are dead letters."""
        rows = self.query("SELECT sink, sum(dead IS NULL), sum(dead IS NOT NULL) FROM delivery GROUP BY sink")
        return {row[0]: (row[1], row[2]) for row in rows}

    # What people and programs read.

    def part(self, number: int) -> Part | None:
        """One part, or None."""
        rows = self.query("SELECT * FROM part WHERE id = ?", number)
        return _part(rows[0]) if rows else None

    def parts(self, where: str = "1", *values: Any, order: str = "id", limit: int = -1) -> list[Part]:
        """Parts that fulfil an SQL condition; its words are the caller's, its values are not."""
        rows = self.query(f"SELECT * FROM part WHERE {where} ORDER BY {order} LIMIT {limit:d}", *values)
        return [_part(row) for row in rows]

    def say(self, part: int, said: Said, by: str) -> None:
        """Write what a person says of a part; what was said before stays in the table `review`."""
        with self.transaction() as db:
            db.execute("UPDATE part SET said = ? WHERE id = ?", (said, part))
            db.execute("INSERT INTO review VALUES (?, ?, ?, ?)", (part, time.time(), by, said))

    def forget_pictures(self, part: int) -> None:
        """Write that a part's files are removed; its verdict stays."""
        with self.transaction() as db:
            db.execute(
                "UPDATE part SET pictures = 0, bytes = 0, overlay = NULL, maps = NULL WHERE id = ?", (part,)
            )


def _tell(db: sqlite3.Connection, part: int, sinks: Sequence[str]) -> None:
    db.executemany("INSERT INTO delivery (sink, part) VALUES (?, ?)", [(sink, part) for sink in sinks])


def _part(row: sqlite3.Row) -> Part:
    values = {field.name: row[field.name] for field in fields(Part)}
    values["pictures"] = bool(values["pictures"])
    values["defects"] = None if values["defects"] is None else json.loads(values["defects"])
    return Part(**values)
