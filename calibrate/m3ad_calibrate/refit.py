"""A bundle and what people said of a station's parts -> another bundle beside it, and what it changed; torch-free.

Good parts alone are learned from. Some of them are held out, and they and every part that somebody called a defect say
what became better and what worse. The bundle that the station uses is not touched before `promote`.
"""

import datetime
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from m3ad import bundle as artefact
from m3ad.atomic import file_beside, folder_beside, locked, put_in_place
from m3ad.bundle import MANIFEST, Bundle, sha256_of
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.ledger import Ledger, Part
from m3ad.limits import Limits
from m3ad.reference import Looks
from m3ad.rig import Rig

from m3ad_calibrate.refit_report import changes, markdown, rates
from m3ad_calibrate.reviewed import LEAST_FIT, Reviewed, Scorer, divided
from m3ad_calibrate.threshold import Threshold, fit_threshold

What = Literal["threshold", "svm", "baseline", "bank"]
Say = Callable[[str], None]
MOST_LEARNERS = 32  # frames in memory at once; a baseline and a bank hardly change beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is refitted and how.

    Args:
        what: `threshold` alone, the default: graphs, maps and engines stay, so only one number can be wrong.
            `svm`, `baseline` (and with it the SVM) and `bank` change the graphs; then some of the good parts set the
            threshold that the others' graphs need.
        held_out: share of the reviewed good parts that nothing is fitted to.
        seed: of the division, and of a bank's coreset.
        false_alarm_rate: wanted share of good parts above the threshold; None lets those that set it pass.
        review_rate: the same of the review limit; None keeps the bundle's where only the threshold changes, else none.
    """

    what: What = "threshold"
    held_out: float = 1 / 3
    seed: int = 0
    false_alarm_rate: float | None = None
    review_rate: float | None = None


def refit(
    source: Bundle, ledger: Ledger, camera: str, out: Path, settings: Settings, say: Say = lambda _: None
) -> dict[str, Any]:
    """Write a refitted bundle to `out`, and `out`.refit.json and .md beside it; the report.

    Args:
        source: verified.
        ledger: may be written to by a running station meanwhile.
        camera: whose parts; they must be of the bundle's category.
        out: another folder than the source's; an older bundle there is replaced.
        settings: see there.
        say: is told what is being done.

    Raises:
        FrameError: there are too few reviewed good parts, or too few of their frames are left.
        ArtifactError: the bundle has nothing of what is to be refitted, or `out` is something else.
        M3adError: `out` is the source.
    """
    if out.resolve() == source.path.resolve():
        raise M3adError(f"name another folder than {source.path}: the refitted bundle is written beside it")
    parts = ledger.parts("said IS NOT NULL AND camera = ?", camera)
    reviewed = divided(parts, settings.held_out, settings.seed, f"{ledger.path} (camera {camera})")
    old = Scorer(source, ledger)
    judging = [*reviewed.held_out, *reviewed.defects]
    say(f"scoring {len(judging)} parts by {source.path.name}")
    before = old.scores(judging)
    with artefact.new_folder(out, artefact.FORMAT) as folder:
        work = (
            folder / "work" / "bundle"
        )  # the folder itself is locked, and a bundle's writer locks its parent
        bundle, learners, setters = _changed(source, work, old, reviewed, settings, say)
        new = old if settings.what == "threshold" else Scorer(bundle, ledger)
        say(f"scoring {len(setters)} parts for the threshold")
        fitted = new.scores(setters)
        if len(fitted) < LEAST_FIT // 2:
            raise FrameError(
                f"only {len(fitted)} frames of reviewed good parts are there any more, {LEAST_FIT // 2} are needed to "
                "set a threshold; raise the station's keep_days"
            )
        if settings.what != "threshold":
            say(f"scoring {len(judging)} parts by the refitted bundle")
        after = before if settings.what == "threshold" else new.scores(judging)
        threshold, limits = _limits(source, list(fitted.values()), settings)
        before = {part: score for part, score in before.items() if part in after}
        known = source.manifest.threshold
        was = known.limits
        good = [{p.id: s[p.id] for p in reviewed.held_out if p.id in s} for s in (before, after)]
        defects = [{p.id: s[p.id] for p in reviewed.defects if p.id in s} for s in (before, after)]
        gone = old.gone | new.gone
        report: dict[str, Any] = {
            "format": "m3ad-refit",
            "category": source.name,
            "what": _all_of(settings.what),
            "camera": camera,
            "source_manifest_sha256": sha256_of(source.path / MANIFEST),
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seed": settings.seed,
            "held_out_share": settings.held_out,
            "fitted_to": [_told(p) for p in (*learners, *setters) if p.id not in gone],
            "held_out": [_told(p) for p in reviewed.held_out if p.id in after],
            "defects": len(reviewed.defects),
            "before": rates(good[0], defects[0], was),
            "after": rates(good[1], defects[1], limits),
            "changes": changes(judging, before, after, (was, limits)),
        }
        report["notes"] = _notes(report, reviewed, gone, old, judging, settings)
        record = {
            **asdict(threshold),
            "review": limits.review,
            "reviewed_scores": list(fitted.values()),
            "parts": [f"reviewed/{camera}/{p.name}" for p in setters if p.id in fitted],
        }
        document = {**bundle.document, "threshold": record, "refit": report}
        if reference := _reference(source, old, [*learners, *setters]):
            document["reference"] = reference
        artefact.write_json(work / MANIFEST, Bundle.of_document(work, document).document)
        Bundle.open(work)
        for path in list(work.iterdir()):
            os.replace(path, folder / path.name)
        work.rmdir()
        work.parent.rmdir()
    artefact.write_json(out.with_name(f"{out.name}.refit.json"), report)
    with file_beside(out.with_name(f"{out.name}.refit.md")) as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")
    return report


def _changed(
    source: Bundle, work: Path, scorer: Scorer, reviewed: Reviewed, settings: Settings, say: Say
) -> tuple[Bundle, list[Part], list[Part]]:
    """The bundle before its threshold, the parts that its graphs learned from, and those for the threshold."""
    keep_engines = settings.what == "threshold"
    for file in source.manifest.files:
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / file, work / file)
    for extra in ("engines", "calibration/recorded") if keep_engines else ():
        if (source.path / extra).is_dir() and not (work / extra).exists():
            shutil.copytree(source.path / extra, work / extra)
    artefact.write_json(work / MANIFEST, {k: v for k, v in source.document.items() if k != "promoted"})
    bundle = Bundle.open(work)
    if settings.what == "threshold":
        return bundle, [], reviewed.fit
    from m3ad_calibrate.refit_graphs import refit_bank, refit_vote

    # A bank knows its own rows, a baseline its own frames: other parts have to set the limit.
    half, setters = reviewed.fit[::2], reviewed.fit[1::2]
    learners = half[:: -(-len(half) // MOST_LEARNERS)]
    say(f"learning from {len(learners)} parts")
    frames = list(scorer.frames(learners))
    if settings.what == "bank":
        return refit_bank(bundle, frames, source, settings.seed), learners, setters
    changed = refit_vote(bundle, frames, source, with_baseline=settings.what == "baseline")
    return changed, learners, setters


def _limits(source: Bundle, scores: Sequence[float], settings: Settings) -> tuple[Threshold, Limits]:
    """The threshold, and both limits."""
    threshold = fit_threshold(scores, settings.false_alarm_rate)
    if settings.review_rate is not None:
        review: float | None = fit_threshold(scores, settings.review_rate).value
    else:
        review = source.manifest.threshold.review if settings.what == "threshold" else None
        review = None if review is None else min(review, threshold.value)
    try:
        return threshold, Limits(threshold.value, review)
    except ValueError as error:
        raise M3adError(str(error)) from error


def _reference(source: Bundle, scorer: Scorer, parts: Sequence[Part]) -> dict[str, Any] | None:
    """How the line's frames look now, for the station's drift; None of too few."""
    rig = source.manifest.rig
    looks = Looks(source.preprocessing, Rig.from_json(rig, str(source.path)) if rig else None)
    for frame in scorer.frames(parts):
        looks.add(frame)
    found = looks.reference()
    return found.to_json() if found else None


def _notes(
    report: dict[str, Any],
    reviewed: Reviewed,
    gone: set[int],
    scorer: Scorer,
    parts: Sequence[Part],
    settings: Settings,
) -> list[str]:
    notes = [
        "people review what was rejected or came near: these rates are of such parts, not of all that the line makes"
    ]
    if not report["after"]["misses"]["of"]:
        notes.append("nobody called a part a defect, so nothing is known of misses: review defects, too")
    if gone:
        notes.append(f"the frames of {len(gone)} reviewed parts are not there any more")
    if reviewed.disputed:
        notes.append(f"{reviewed.disputed} contents were called good and defect, and are left out")
    if reviewed.unusable:
        notes.append(f"{reviewed.unusable} reviewed parts could not be inspected")
    if moved := scorer.moved_limits(parts):
        notes.append(
            f"the station's configuration sets the limit of reject to {moved.reject:.6g} itself, which goes before the "
            "bundle's: take `threshold` and `review` of this camera out of it"
        )
    if settings.what != "threshold":
        notes.append(
            "engines, recorded inputs and a gate's figures belong to the old graphs: build and gate anew"
        )
    return notes


def _all_of(what: What) -> list[What]:
    more: list[What] = ["svm"] if what == "baseline" else []
    return ["threshold"] if what == "threshold" else [what, *more, "threshold"]


def _told(part: Part) -> dict[str, Any]:
    return {
        "part": part.id,
        "name": part.name,
        "rgb_sha256": part.rgb_sha256,
        "xyz_sha256": part.xyz_sha256,
    }


def promote(refitted: Bundle, target: Path, by: str, reason: str | None) -> Path:
    """Put a refitted bundle in the place of the one it was made from, by a person's word; where the old one is now.

    Args:
        refitted: verified.
        target: the bundle that a station's configuration names; it takes effect at the station's next start.
        by: who says so.
        reason: why, needed where the refitted bundle misses more defects.

    Raises:
        ArtifactError: it was not made from `target` as that is now, or by `refit` at all.
        M3adError: nobody says so, or says why.
    """
    report = refitted.document.get("refit")
    if not report:
        raise ArtifactError(f"{refitted.path} was not written by m3ad-calibrate refit; name its OUT")
    current = Bundle.open(target)
    digest = sha256_of(target / MANIFEST)
    if report["source_manifest_sha256"] != digest:
        raise ArtifactError(
            f"{refitted.path} was compared with another bundle than {current.path} is now; refit that one again"
        )
    if not by.strip():
        raise M3adError("a bundle is promoted by somebody's word: say whose with --by NAME")
    worse = report["after"]["misses"]["count"] - report["before"]["misses"]["count"]
    if worse > 0 and not (reason or "").strip():
        raise M3adError(
            f"{refitted.path} misses {worse} more of the defects that people named; say why it is taken all the same "
            "with --reason, or refit something else"
        )
    aside = target.resolve().with_name(f"{target.resolve().name}.{digest[:12]}")
    at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with locked(target), folder_beside(target.resolve()) as temporary:
        copy = temporary / "new"
        shutil.copytree(refitted.path, copy)
        promoted = {"by": by, "reason": reason, "at": at, "before": aside.name}
        artefact.write_json(copy / MANIFEST, {**refitted.document, "promoted": promoted})
        Bundle.open(copy)
        if not aside.exists():
            kept = temporary / "old"
            shutil.copytree(target, kept, copy_function=os.link)
            os.replace(kept, aside)
        put_in_place(copy, target.resolve())
    return aside
