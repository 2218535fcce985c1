"""Accuracy against time as an SVG: published points grey, measured ones coloured."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

COLOURS = (
    *("#c1272d", "#0071bc", "#2e8b57", "#b8860b", "#7b3f9d", "#d2691e", "#008b8b", "#444444"),
    *("#e377c2", "#7f9f00", "#00bfff", "#6b4226"),
)
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 26, 56
GREY = "#999999"
LABEL = 90, 13  # pixels that a label needs to the right of its point, and its height


class Point(NamedTuple):
    """A method's place: milliseconds a frame, image AUROC; measured here or published, trained with few steps."""

    title: str
    milliseconds: float
    auroc: float
    here: bool
    reduced: bool = False


def points_of(result: Mapping[str, Any]) -> list[Point]:
    """Every point there is."""
    found = []
    for row in result["rows"]:
        told, measured = row["published"] or {}, row["measured"]
        if told.get("frames_per_second") and told.get("i_auroc"):
            found.append(Point(row["title"], 1e3 / told["frames_per_second"], told["i_auroc"], False))
        if measured and (metrics := measured["metrics"]) and "i_auroc" in metrics:
            time, reduced = 1e3 / measured["frames_per_second"], measured["training"].startswith("reduced")
            found.append(Point(row["title"], time, metrics["i_auroc"], True, reduced))
    return found


def picture(result: Mapping[str, Any]) -> str:
    """The SVG: milliseconds a frame (inference only, logarithmic) across, image AUROC up."""
    points = points_of(result)
    times, scores = [p[1] for p in points], [p[2] for p in points]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)) + 1e-9)
    bottom = min(math.floor(min(scores) * 20) / 20, 0.95)

    def x(milliseconds: float) -> float:
        return LEFT + (math.log10(milliseconds) - low) / max(high - low, 1) * (WIDTH - LEFT - RIGHT)

    def y(score: float) -> float:
        return HEIGHT - BOTTOM - (score - bottom) / (1 - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 16, f"{10.0**power:g}", "middle"))
    steps = 5
    for k in range(steps + 1):
        score = bottom + (1 - bottom) * k / steps
        parts.append(f'<path d="M{LEFT} {y(score):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y(score) + 4, f"{score:.2f}", "end"))
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, "milliseconds a frame, inference only", "middle")
    )
    parts.append(
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 6,
            "published on MVTec 3D-AD's mean, measured on DATA",
            "middle",
            GREY,
        )
    )
    parts.append(_text(4, 13, "image AUROC"))
    measured = [p for p in points if p.here]
    published = [(x(p.milliseconds), y(p.auroc)) for p in points if not p.here]
    for point in points:
        at, up = x(point.milliseconds), y(point.auroc)
        colour = COLOURS[measured.index(point) % len(COLOURS)] if point.here else GREY
        parts.append(_circle(at, up, colour, hollow=point.reduced))
        if not point.here:
            crowded = any(0 < a - at < LABEL[0] and abs(b - up) < LABEL[1] for a, b in published)
            if crowded:
                parts.append(_text(at, up + 18, point.title, "middle", GREY))
            else:
                parts.append(_text(at + 8, up + 4, point.title, colour=GREY))
    legend = [
        (COLOURS[k % len(COLOURS)], f"{p.title}, here", p.reduced) for k, p in enumerate(measured)
    ]  # measured points crowd near 1: a legend instead of labels
    legend.append((GREY, "published", False))
    for k, (colour, text, hollow) in enumerate(legend):
        parts.append(_circle(WIDTH - RIGHT + 20, TOP + 12 + 20 * k, colour, hollow=hollow))
        parts.append(_text(WIDTH - RIGHT + 30, TOP + 16 + 20 * k, text))
    if any(p.reduced for p in measured):
        parts.append(_text(WIDTH - RIGHT + 14, TOP + 22 + 20 * len(legend), "hollow: few steps", colour=GREY))
    return "\n".join([*parts, "</svg>", ""])


def _circle(x: float, y: float, colour: str, *, hollow: bool) -> str:
    fill = f'fill="white" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {fill}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
