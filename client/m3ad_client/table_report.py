"""The table of methods for a terminal of 100 columns and as Markdown."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m3ad_client.report import Table, conditions

WIDTH, TITLE_WIDTH = 100, 18
HEADS = ("", "I-AUROC", "@30", "@1", "frames/s", "e2e/s", "p50 ms", "p99 ms", "MB", "M par.", "bundle")
Cells = tuple[str, ...]
Row = Mapping[str, Any]


def terminal(result: Row) -> str:
    """Two lines a method, what papers say and what was measured here; no line is longer than WIDTH."""
    lines: list[tuple[str, ...]] = [("method", *HEADS)]
    for row in result["rows"]:
        title, rest = [*textwrap.wrap(row["title"], TITLE_WIDTH), ""][:2]
        lines += [(title, *cells(row, "paper")), (rest, *cells(row, "here"))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS) + 1)]
    gap = "  " if sum(widths) + 2 * len(HEADS) <= WIDTH else " "
    rule = "-" * (sum(widths) + len(gap) * len(HEADS))

    def shown(line: Sequence[str]) -> str:
        aligned = (str.ljust if i < 2 else str.rjust for i in range(len(line)))
        put: Sequence[Callable[[str, int], str]] = list(aligned)
        return gap.join(put[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip()

    told = [shown(lines[0]), rule, *map(shown, lines[1:])]
    notes = [
        f"{prefix}{line}"
        for note in notes_of(result)
        for prefix, line in zip(("- ", *["  "] * len(note)), textwrap.wrap(note, WIDTH - 2), strict=False)
    ]
    return "\n".join([*told, "", *notes])


def markdown(result: Row) -> str:
    """One row a method: published figures, then measured ones."""
    heads = [
        "method",
        "published: I-AUROC",
        "AUPRO@30",
        "AUPRO@1",
        "frames/s",
        "MB",
        "measured: I-AUROC",
        "AUPRO@30",
        "AUPRO@1",
        "frames/s",
        "end to end/s",
        "p50 / p99 ms",
        "peak MB",
        "M parameters",
        "bundle MB",
    ]
    rows = []
    for row in result["rows"]:
        paper, here = cells(row, "paper"), cells(row, "here")
        measured = [*here[1:6], f"{here[6]} / {here[7]}", *here[8:]] if row["measured"] else [""] * 9
        rows.append([row["title"], *paper[1:5], paper[8], *measured])
    return Table("Methods, published and measured", heads, rows, notes_of(result)).to_markdown()


def cells(row: Row, side: str) -> Cells:
    """HEADS of one side of a row: `paper`, or `here`; empty where there is no figure."""
    if side == "paper":
        told = row["published"]
        if not told:
            return ("paper", *[""] * (len(HEADS) - 1))
        scores = [number(told[name], 3) for name in ("i_auroc", "aupro_30", "aupro_1")]
        rest = ["", "", "", number(told["memory_mb"], 0), "", ""]
        return ("paper", *scores, number(told["frames_per_second"], 2), *rest)
    found = row["measured"]
    if not found:
        return ("here", *["-"] * (len(HEADS) - 1))
    metrics = found["metrics"] or {}
    return (
        "here",
        *(number(metrics.get(name), 3) for name in ("i_auroc", "aupro_30", "aupro_1")),
        number(found["frames_per_second"], 2),
        number(found["frames_per_second_end_to_end"], 2),
        number(found["p50_ms"], 0),
        number(found["p99_ms"], 0),
        number(found["peak_bytes"] and found["peak_bytes"] / 1e6, 0),
        number(found["parameters"] and found["parameters"] / 1e6, 1),
        number(found["bundle_bytes"] / 1e6, 0),
    )


def number(value: float | None, digits: int) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def notes_of(result: Row) -> list[str]:
    """What must be known to read the table: weights and training of each row, why rows are empty, the sources."""
    measured = {row["measured"]["name"]: row for row in result["rows"] if row["measured"]}
    weights = [
        f"{row['title']}: {row['measured']['training']}; {row['measured']['weights']}"
        for row in measured.values()
    ]
    absent = [f"{row['title']} is not measured: {row['why']}" for row in result["rows"] if row["why"]]
    bench = result["bench"]["rows"]
    first = next(row for row in bench if row["name"] in measured)
    judged = f"no metrics are measured: {result['judged']}" if result["judged"] else "AUPRO is mvtec99's"
    return [
        *weights,
        *absent,
        f"{judged}; frames/s, p50, p99: tensors ready -> map; e2e/s: files -> verdict; MB: peak of the form's process "
        "(PSS) here, as published above; M par.: millions of fp32 values the form loads; bundle in MB",
        f"the forms take turns frame by frame; {conditions(first).partition(', map within')[0]}",
        *result["sources"],
    ]
