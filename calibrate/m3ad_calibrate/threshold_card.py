"""The threshold card: which limits a bundle has, from which parts, at which rate, and which graphs they are for."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3ad.atomic import file_beside
from m3ad.bundle import Bundle, write_json
from m3ad.limits import Limits
from m3ad.serving import weights_line

from m3ad_calibrate.gate import onnx_digest
from m3ad_calibrate.threshold import Threshold


def card(bundle: Bundle, reject: Threshold, review: Threshold | None, parts: list[str]) -> dict[str, Any]:
    """The card as it stands in a file, for people and programs.

    Args:
        bundle: whose scores they are.
        reject: the limit of a defect.
        review: the limit from which somebody looks, where there is one.
        parts: the good parts whose scores the rates are of.

    Raises:
        ValueError: review lies above reject.
    """
    Limits(reject.value, review.value if review else None)
    manifest = bundle.manifest
    return {
        "format": "m3ad-threshold-card",
        "bundle": {
            "category": manifest.category,
            "method": manifest.method,
            "precision": bundle.precision,
            "weights": weights_line(manifest.encoders, manifest.official),
            "onnx_sha256": onnx_digest(bundle),
        },
        "reject": asdict(reject),
        "review": asdict(review) if review else None,
        "parts": parts,
    }


def save_card(document: dict[str, Any], path: Path) -> list[Path]:
    """Write `path`.json and `path`.md."""
    files = path.with_suffix(".json"), path.with_suffix(".md")
    write_json(files[0], document)
    with file_beside(files[1]) as temporary:
        temporary.write_text(markdown(document), encoding="utf-8")
    return list(files)


def markdown(document: dict[str, Any]) -> str:
    """The card as a page."""
    bundle, parts = document["bundle"], document["parts"]
    rows = [("defect", document["reject"]), ("review", document["review"])]
    lines = [
        f"# Limits of {bundle['category']}",
        "",
        f"{bundle['method']}, {bundle['precision']}; {bundle['weights']}; graphs {bundle['onnx_sha256'][:16]}",
        "",
        "| verdict | score above | rule | good parts above | 95 % interval of that rate |",
        "|---|---|---|---|---|",
    ]
    for name, limit in rows:
        if limit is None:
            lines.append(f"| {name} | no limit | | | |")
            continue
        seen = f"{limit['false_alarms']} of {limit['frames']}" if limit["frames"] else "not known"
        interval = f"{limit['false_alarm_rate_low']:.3f} .. {limit['false_alarm_rate_high']:.3f}"
        lines.append(
            f"| {name} | {limit['value']:.6g} | {limit['rule']} | {seen} "
            f"| {interval if limit['frames'] else 'not known'} |"
        )
    told = ", ".join(parts) or "none; the limits were set by hand, their rates are not known"
    return "\n".join([*lines, "", f"Good parts: {told}.", ""])
