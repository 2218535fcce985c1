"""What is kept for how long: frames, overlays and maps by age and size; verdicts stay."""

import time
from pathlib import Path

from m3ad.ledger import Ledger, Part

from m3ad_client.station import config
from m3ad_client.station.sources import remove

DAY_S, GIB = 86_400.0, 2**30


def tidy(ledger: Ledger, store: config.Store, now: float | None = None) -> int:
    """Remove the pictures of parts that are too old, then of the oldest until the rest fits; their number.

    A part that is not judged yet keeps its files. Those that somebody reviewed go last: a refit needs them.
    """
    too_old = (time.time() if now is None else now) - store.keep_days * DAY_S
    gone = ledger.parts("pictures AND state != 'taken' AND judged_at < ?", too_old)
    for part in gone:
        _forget(ledger, store.folder, part)
    (row,) = ledger.query("SELECT coalesce(sum(bytes), 0) FROM part WHERE pictures")
    over = row[0] - store.keep_gib * GIB
    count = len(gone)
    while over > 0:
        oldest = ledger.parts("pictures AND state != 'taken'", order="said IS NOT NULL, id", limit=100)
        if not oldest:
            break
        for part in oldest:
            if over > 0:
                over -= part.bytes
                count += 1
                _forget(ledger, store.folder, part)
    return count


def _forget(ledger: Ledger, folder: Path, part: Part) -> None:
    # Files first: whoever is killed in between finds the part once more.
    remove(*(folder / name for name in (part.rgb, part.xyz, part.overlay, part.maps) if name))
    ledger.forget_pictures(part.id)
