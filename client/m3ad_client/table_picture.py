"""Accuracy against time as an SVG: published points grey, measured ones coloured."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

COLOURS = ("#c1272d", "#0071bc", "#2e8b57", "#b8860b", "#7b3f9d", "#d2691e", "#008b8b", "#444444")
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 20, 56
GREY = "#999999"


def points_of(result: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Every point there is: title, milliseconds a frame, image AUROC, whether it was measured here."""
    found = []
    for row in result["rows"]:
        told, measured = row["published"] or {}, row["measured"]
        if told.get("frames_per_second") and told.get("i_auroc"):
            found.append((row["title"], 1e3 / told["frames_per_second"], told["i_auroc"], False))
        if measured and (metrics := measured["metrics"]) and "i_auroc" in metrics:
            found.append((row["title"], 1e3 / measured["frames_per_second"], metrics["i_auroc"], True))
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
    measured = [title for title, _, _, here in points if here]
    for title, milliseconds, score, here in points:
        colour = COLOURS[measured.index(title) % len(COLOURS)] if here else GREY
        at, up = x(milliseconds), y(score)
        parts.append(f'<circle cx="{at:.1f}" cy="{up:.1f}" r="5" fill="{colour}"/>')
        if not here:
            parts.append(_text(at + 8, up + 4, title, colour=GREY))
    for k, title in enumerate(measured):  # measured points crowd near 1: a legend instead of labels
        parts.append(
            f'<circle cx="{WIDTH - RIGHT + 20}" cy="{TOP + 12 + 20 * k}" r="5" fill="{COLOURS[k % len(COLOURS)]}"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 30, TOP + 16 + 20 * k, f"{title}, here"))
    after = TOP + 12 + 20 * len(measured)
    parts.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{after}" r="5" fill="{GREY}"/>')
    parts.append(_text(WIDTH - RIGHT + 30, after + 4, "published"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
