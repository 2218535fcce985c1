"""What a refit changed on parts that it never saw: false alarms and misses before and after, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from m3ad.ledger import Part
from m3ad.limits import Limits, verdict

from m3ad_calibrate.threshold import interval


def rates(good: Mapping[int, float], defects: Mapping[int, float], limits: Limits) -> dict[str, Any]:
    """How parts of known verdicts are judged.

    A false alarm is a good part above the limit of reject, a miss a defect that nobody would look at: not above the
    lowest limit. The intervals are Clopper and Pearson's (95 %).

    Args:
        good: score by part.
        defects: score by part.
        limits: what scores are held against.
    """
    alarms = sum(score > limits.reject for score in good.values())
    misses = sum(score <= limits.lowest for score in defects.values())
    return {
        "reject": limits.reject,
        "review": limits.review,
        "false_alarms": _rate(alarms, len(good)),
        "looked_at": sum(verdict(score, limits) == "review" for score in good.values()),
        "misses": _rate(misses, len(defects)),
    }


def _rate(count: int, of: int) -> dict[str, Any]:
    low, high = interval(count, of) if of else (0.0, 1.0)
    return {"count": count, "of": of, "low": low, "high": high}


def changes(
    parts: Sequence[Part],
    before: Mapping[int, float],
    after: Mapping[int, float],
    limits: tuple[Limits, Limits],
) -> list[dict[str, Any]]:
    """The parts whose verdict is another one."""
    found = []
    for part in parts:
        if part.id not in before or part.id not in after:
            continue
        old, new = verdict(before[part.id], limits[0]), verdict(after[part.id], limits[1])
        if old != new:
            scores = {"old_score": before[part.id], "new_score": after[part.id]}
            told = {"part": part.id, "name": part.name, "said": part.said}
            found.append({**told, "old": old, "new": new, **scores})
    return found


def sentence(report: Mapping[str, Any]) -> str:
    """What came of it, in one line."""
    before, after = report["before"], report["after"]
    return (
        f"on parts held out: {_told(before['false_alarms'])} -> {_told(after['false_alarms'])} good parts are called "
        f"defects; {_told(before['misses'])} -> {_told(after['misses'])} defects are missed"
    )


def _told(rate: Mapping[str, Any]) -> str:
    return f"{rate['count']} of {rate['of']}" if rate["of"] else "none known"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# {report['category']}: {', '.join(report['what'])} refitted from reviewed parts",
        "",
        f"Camera {report['camera']}; {len(report['fitted_to'])} good parts were learned from, "
        f"{len(report['held_out'])} of {len(report['held_out']) + len(report['fitted_to'])} held out (share "
        f"{report['held_out_share']:g}, seed {report['seed']}); nothing is learned from the {report['defects']} parts "
        "that somebody called defects.",
        "",
        "| on parts held out | before | 95 % interval | after | 95 % interval |",
        "|---|---|---|---|---|",
        f"| limit of reject | {report['before']['reject']:.6g} | | {report['after']['reject']:.6g} | |",
        f"| limit of review | {_limit(report['before'])} | | {_limit(report['after'])} | |",
    ]
    for key, name in (("false_alarms", "good parts called defects"), ("misses", "defects missed")):
        cells = [
            f"{_told(side[key])} | {side[key]['low']:.3f} .. {side[key]['high']:.3f}"
            for side in (report["before"], report["after"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        f"| good parts to look at | {report['before']['looked_at']} | | {report['after']['looked_at']} | |",
        "",
        *(f"- {note}" for note in report["notes"]),
    ]
    if report["changes"]:
        lines += ["", "| part | name | a person said | before | now |", "|---|---|---|---|---|"]
        lines += [
            f"| {c['part']} | {c['name']} | {c['said']} | {c['old']}, {c['old_score']:.6g} | {c['new']}, "
            f"{c['new_score']:.6g} |"
            for c in report["changes"]
        ]
    return "\n".join(lines) + "\n"


def _limit(side: Mapping[str, Any]) -> str:
    return "none" if side["review"] is None else f"{side['review']:.6g}"
