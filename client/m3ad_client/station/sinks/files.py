"""Verdicts at the end of a file: a line of JSON each, or a row of CSV."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]

COLUMNS = (
    "id",
    "camera",
    "part",
    "verdict",
    "score",
    "reject",
    "review",
    "defects",
    "largest_mm2",
    "fault",
    "judged_at",
)


class LineFile:
    """A file that gets a line an event, each on the disk before the next; half a line is never left in it.

    Args:
        path: the file; its folder must be there.
        line: an event's line, with its end.
        header: what an empty file gets first.
    """

    def __init__(self, path: Path, line: Callable[[Event], str], header: str = "") -> None:
        self.path, self.line, self.header = path, line, header

    def send(self, event: Event) -> None:
        """Append an event.

        Raises:
            OSError: the file cannot be written.
        """
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            whole = _whole(file, end)
            if whole != end:  # a writer was killed, or a disk was full
                file.truncate(whole)
            text = (self.header if whole == 0 else "") + self.line(event)
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, whole)
                raise

    def close(self) -> None:
        """Nothing stays open."""


def json_lines(path: Path) -> LineFile:
    """A file of JSON lines."""
    return LineFile(path, lambda event: json.dumps(event, allow_nan=False) + "\n")


def csv_rows(path: Path) -> LineFile:
    """A file of CSV with a header; `defects` is their number."""
    return LineFile(path, lambda event: _row(_cells(event)), _row(COLUMNS))


def _cells(event: Event) -> list[Any]:
    limits, defects = event["limits"] or {}, event["defects"] or []
    areas = [defect["area_mm2"] for defect in defects if defect["area_mm2"] is not None]
    told = {
        **event,
        "reject": limits.get("reject"),
        "review": limits.get("review"),
        "defects": len(defects),
        "largest_mm2": max(areas, default=None),
    }
    return [told[name] for name in COLUMNS]


def _row(cells: Any) -> str:
    text = io.StringIO()
    # A fault's sentence may have line breaks; a row is one line, so that a torn one can be told.
    csv.writer(text, lineterminator="\n").writerow(
        [c.replace("\n", " ") if isinstance(c, str) else c for c in cells]
    )
    return text.getvalue()


def _whole(file: Any, end: int) -> int:
    """Where the last whole line ends."""
    at = end
    while at > 0:
        start = max(0, at - 4096)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            return int(start + newline + 1)
        at = start
    return 0
