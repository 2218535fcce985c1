"""What a sink tells of a part: the same fields in JSON lines, CSV, webhooks and MQTT."""

from typing import Any

from m3ad.ledger import Part

FORMAT = "m3ad-verdict/1"


def event(part: Part, setup: dict[str, Any]) -> dict[str, Any]:
    """A part's verdict for the plant; `id` is the same whenever it is told again.

    Args:
        part: judged, or one that cannot be inspected: its `verdict` is null and `fault` says why.
        setup: what judged it, empty for a fault.
    """
    return {
        "format": FORMAT,
        "id": part.id,
        "camera": part.camera,
        "part": part.name,
        "verdict": part.verdict,
        "score": part.score,
        "limits": setup.get("limits"),
        "defects": part.defects,
        "drift": setup.get("drift", []),
        "fault": part.fault,
        "taken_at": part.taken_at,
        "judged_at": part.judged_at,
        "inspect_ms": part.inspect_ms,
        "category": setup.get("category"),
        "bundle_sha256": setup.get("bundle_sha256"),
        "rgb_sha256": part.rgb_sha256,
        "xyz_sha256": part.xyz_sha256,
    }
