"""Filters of the list of parts, and the pages that they give: by number, so that page 200 is as fast as the first."""

import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlencode

from m3ad.ledger import Ledger, Part

PAGE = 50
WORDS = {
    "good": "verdict = 'good'",
    "review": "verdict = 'review'",
    "defect": "verdict = 'defect'",
    "fault": "state = 'fault'",
    # What a person should look at: whatever is not good, until somebody said what it is.
    "open": "verdict IN ('review', 'defect') AND said IS NULL",
}


@dataclass(frozen=True, slots=True)
class Filters:
    """What the list shows; None or empty: everything.

    Attributes:
        verdict: good, review, defect, fault, or `open`: not good, and nobody said yet what it is.
        least, most: of the score.
        mm2: least area of the largest defect.
        days: how old at most.
        before: the number below which the list starts.
    """

    camera: str = ""
    verdict: str = ""
    least: float | None = None
    most: float | None = None
    mm2: float | None = None
    days: float | None = None
    before: int | None = None

    @classmethod
    def read(cls, query: dict[str, str]) -> "Filters":
        """The filters of a query string; what it has besides is left alone.

        Raises:
            ValueError: a number is none, or there is no such verdict.
        """
        numbers: dict[str, Any] = {}
        for name in ("least", "most", "mm2", "days", "before"):
            if text := query.get(name, "").strip():
                try:
                    numbers[name] = int(text) if name == "before" else float(text)
                except ValueError as error:
                    raise ValueError(f"{name} is {text!r}, expected a number") from error
        verdict = query.get("verdict", "")
        if verdict and verdict not in WORDS:
            raise ValueError(f"verdict is {verdict!r}, expected one of {', '.join(WORDS)}")
        return cls(camera=query.get("camera", ""), verdict=verdict, **numbers)

    def query(self, **changed: Any) -> str:
        """The query string of these filters with some of them changed."""
        values = {**asdict(self), **changed}
        return urlencode({name: value for name, value in values.items() if value not in (None, "")})

    def where(self) -> tuple[str, list[Any]]:
        """As a condition of SQL with its values, without `before`."""
        terms, values = ["state != 'taken'"], []
        if self.verdict:
            terms.append(WORDS[self.verdict])
        for term, value in (
            ("camera = ?", self.camera or None),
            ("score >= ?", self.least),
            ("score <= ?", self.most),
            ("largest_mm2 >= ?", self.mm2),
            ("judged_at >= ?", None if self.days is None else time.time() - 86_400 * self.days),
        ):
            if value is not None:
                terms.append(term)
                values.append(value)
        return " AND ".join(terms), values


def listed(ledger: Ledger, filters: Filters) -> tuple[list[Part], bool]:
    """A page of parts, the newest first, and whether there are more."""
    where, values = filters.where()
    if filters.before is not None:
        where, values = f"{where} AND id < ?", [*values, filters.before]
    found = ledger.parts(where, *values, order="id DESC", limit=PAGE + 1)
    return found[:PAGE], len(found) > PAGE


def beside(ledger: Ledger, filters: Filters, number: int) -> dict[str, int | None]:
    """The next newer and the next older part that the filters show."""
    where, values = filters.where()
    newer = ledger.parts(f"{where} AND id > ?", *values, number, order="id", limit=1)
    older = ledger.parts(f"{where} AND id < ?", *values, number, order="id DESC", limit=1)
    return {"newer": newer[0].id if newer else None, "older": older[0].id if older else None}
