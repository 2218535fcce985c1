"""The parts of a ledger judged again, by another bundle, engine or version: which verdicts change."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from m3ad.errors import FrameError, M3adError
from m3ad.kept import kept_frame
from m3ad.ledger import Ledger, Part, Said
from m3ad.limits import VERDICTS, Limits
from m3ad.overlay import PAPER, save_png
from PIL import Image

from m3ad_client.infer import AnyInspector, picture
from m3ad_client.report import Table

PAGE_PARTS = 500  # read at once: a station's ledger may hold millions
GAP_PX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A part judged again.

    Attributes:
        part, camera, name, said: as in the ledger.
        old, new: verdicts; `fault` where it could not be inspected, and `fault` then says why it cannot now.
        old_reject, new_reject: the limits that the scores were held against.
        picture: old and new overlay side by side, where the verdict changed and pictures were asked for.
    """

    part: int
    camera: str
    name: str
    old: str
    new: str
    old_score: float | None
    new_score: float | None
    old_reject: float | None
    new_reject: float
    said: Said | None
    fault: str | None = None
    picture: str | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the verdict is another one."""
        return self.old != self.new


def numbers(ledger: Ledger, camera: str | None, last: int | None) -> list[int]:
    """The parts to judge again, oldest first: those that a station is done with.

    Raises:
        M3adError: there are none, or several cameras have some and none is named.
    """
    done = "state != 'taken'"
    rows = ledger.query(f"SELECT camera, count(*) FROM part WHERE {done} GROUP BY camera ORDER BY camera")
    cameras = [row[0] for row in rows]
    if camera is None and len(cameras) > 1:
        raise M3adError(
            f"{ledger.path} has parts of several cameras, which a bundle need not be for; name one with --camera: "
            f"{', '.join(cameras)}"
        )
    if not cameras or (camera is not None and camera not in cameras):
        known = f"; it has parts of {', '.join(cameras)}" if cameras else ""
        raise M3adError(f"{ledger.path} has no judged part{f' of camera {camera}' if camera else ''}{known}")
    found = ledger.query(
        f"SELECT id FROM part WHERE {done} AND camera = ? ORDER BY id DESC LIMIT ?",
        camera or cameras[0],
        -1 if last is None else last,
    )
    return [row[0] for row in reversed(found)]


def replay(
    inspector: AnyInspector, ledger: Ledger, wanted: Sequence[int], out: Path | None, *, old_limits: bool
) -> Iterator[Replayed | None]:
    """Judge parts again, one after the other; None for one whose frame was removed or replaced since.

    Args:
        inspector: the other bundle, engine or server.
        ledger: may be written to by a running station meanwhile.
        wanted: numbers of parts.
        out: folder for the pictures of changed ones.
        old_limits: hold a score against the limits that the part was judged by, not the inspector's.

    Raises:
        M3adError: the ledger or the inspector cannot be used.
    """
    setups: dict[int, Limits] = {}
    own = inspector.limits
    for start in range(0, len(wanted), PAGE_PARTS):
        page = wanted[start : start + PAGE_PARTS]
        marks = ", ".join("?" * len(page))
        for part in ledger.parts(f"id IN ({marks})", *page):
            if part.setup is not None and part.setup not in setups:
                setups[part.setup] = Limits(**ledger.setup(part.setup)["limits"])
            before = None if part.setup is None else setups[part.setup]
            inspector.limits = before if old_limits and before else own
            yield _again(inspector, ledger.path.parent, part, before, out)
    inspector.limits = own


def _again(
    inspector: AnyInspector, folder: Path, part: Part, before: Limits | None, out: Path | None
) -> Replayed | None:
    told: dict[str, Any] = {"new": "fault", "new_score": None}
    image: Image.Image | None = None
    try:
        frame = kept_frame(folder, part, inspector.preprocessing.camera)
        if frame is None:
            return None
        found = inspector.inspect(frame)
    except FrameError as error:
        told["fault"] = str(error)
    else:
        told = {"new": found.verdict, "new_score": found.score}
        image = picture(inspector, frame, found) if out is not None else None
    result = Replayed(
        part=part.id,
        camera=part.camera,
        name=part.name,
        old=part.verdict or "fault",
        old_score=part.score,
        old_reject=before.reject if before else None,
        new_reject=inspector.limits.reject,
        said=part.said,
        **told,
    )
    if out is None or not result.is_changed:
        return result
    path = out / f"{part.camera}_{part.id:09}.png"
    pictures = [_old_overlay(folder, part), image]
    if any(pictures):
        save_png(_side_by_side([each for each in pictures if each]), path)
        return Replayed(**{**asdict(result), "picture": str(path)})
    return result


def _old_overlay(folder: Path, part: Part) -> Image.Image | None:
    if part.overlay is None:
        return None
    try:
        with Image.open(folder / part.overlay) as saved:
            rgb: Image.Image = saved.convert("RGB")
            return rgb
    except OSError:  # retention was faster
        return None


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """As the part was judged, left, and as it is now."""
    width = sum(each.width for each in pictures) + GAP_PX * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(each.height for each in pictures)), PAPER)
    left = 0
    for each in pictures:
        sheet.paste(each, (left, 0))
        left += each.width + GAP_PX
    return sheet


def summary(results: Sequence[Replayed | None]) -> dict[str, Any]:
    """What came of a replay: counts, the changed parts, and how far the scores moved in parts of the old limit."""
    again = [each for each in results if each is not None]
    changed = [each for each in again if each.is_changed]
    moves = [
        abs(each.new_score - each.old_score) / (abs(each.old_reject) or 1.0)
        for each in again
        if each.new_score is not None and each.old_score is not None and each.old_reject is not None
    ]
    kinds = (*VERDICTS, "fault")
    return {
        "replayed": len(again),
        "gone": len(results) - len(again),
        "changed": len(changed),
        "verdicts": {old: {new: _count(again, old, new) for new in kinds} for old in kinds},
        "score_moves": {"median": float(np.median(moves)), "largest": max(moves)} if moves else None,
        "parts": [asdict(each) for each in changed],
    }


def _count(results: Sequence[Replayed], old: str, new: str) -> int:
    return sum(each.old == old and each.new == new for each in results)


def tables(result: dict[str, Any], title: str) -> list[Table]:
    """The counts, and the parts whose verdict is another one."""
    kinds = [k for k in (*VERDICTS, "fault") if any(result["verdicts"][k].values())]
    after = [k for k in (*VERDICTS, "fault") if any(row[k] for row in result["verdicts"].values())]
    notes = [f"{result['changed']} of {result['replayed']} verdicts are other ones"]
    if moves := result["score_moves"]:
        notes.append(
            f"scores moved by {moves['median']:.2%} of the limit of reject (median), {moves['largest']:.2%} (largest)"
        )
    if result["gone"]:
        notes.append(f"{result['gone']} parts were left out: their frames were removed or replaced since")
    counts = Table(
        title,
        ["judged before as", *(f"now {name}" for name in after)],
        [[old, *(str(result["verdicts"][old][new]) for new in after)] for old in kinds],
        notes,
    )
    if not result["parts"]:
        return [counts]
    rows = [
        [
            str(part["part"]),
            part["camera"],
            part["name"],
            _cell(part["old"], part["old_score"], part["old_reject"]),
            part["fault"] or _cell(part["new"], part["new_score"], part["new_reject"]),
            part["said"] or "",
            part["picture"] or "",
        ]
        for part in result["parts"]
    ]
    heads = ["part", "camera", "name", "before", "now", "a person said", "picture"]
    return [counts, Table("Parts whose verdict is another one", heads, rows)]


def _cell(verdict: str, score: float | None, reject: float | None) -> str:
    return verdict if score is None or reject is None else f"{verdict}, {score:.4g} (limit {reject:.4g})"
