"""The command `threshold` of `m3ad-calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import FrameError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.reference import LEAST_FRAMES, Looks, Reference
from m3ad.rig import Rig
from m3ad_runtime.pipeline import Inspector
from rich.progress import track

from m3ad_calibrate.threshold import (
    Kernel,
    SvmInput,
    Threshold,
    at_limit,
    fit_threshold,
    save_score_plot,
)
from m3ad_calibrate.threshold_card import card, save_card

app = typer.Typer()
SVM_FRAMES = 8


@app.command()
def threshold(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")],
    data: Annotated[
        Path | None,
        typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout; not needed with --set"),
    ] = None,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(help="wanted share of good parts called anomalous; none of them if left out"),
    ] = None,
    review_rate: Annotated[
        float | None,
        typer.Option(help="wanted share of good parts that somebody looks at; no such limit if left out"),
    ] = None,
    set_to: Annotated[
        float | None,
        typer.Option("--set", help="the limit itself: a part whose score lies above it is defective"),
    ] = None,
    set_review: Annotated[
        float | None,
        typer.Option("--set-review", help="the limit above which somebody looks; none if left out"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="PNG of the scores, the card's JSON and Markdown beside it; BUNDLE/../threshold.png if left out"
        ),
    ] = None,
    svm: Annotated[
        Kernel | None,
        typer.Option(help="first refit the one-class SVM to good training frames: linear or rbf"),
    ] = None,
    svm_input: Annotated[
        SvmInput | None,
        typer.Option(help="what the refitted SVM sees: the product of the voting terms or all of them"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
) -> None:
    """Set the verdict's limits, from the validation split's good parts or by hand, and write the threshold card."""
    opened = Bundle.open(bundle)
    by_hand = set_to is not None or set_review is not None
    if by_hand == (data is not None):
        raise M3adError("name either --data, to fit the limits to good parts, or --set, to choose them")
    if by_hand and (svm or svm_input or false_alarm_rate is not None or review_rate is not None):
        raise M3adError("--set takes no rate and no --svm; leave it out to fit the limits to good parts")
    for option, rate in (("--false-alarm-rate", false_alarm_rate), ("--review-rate", review_rate)):
        if rate is not None and not 0 < rate < 1:
            raise M3adError(f"{option} must lie between 0 and 1, got {rate}; 0.05 is one in twenty")
    if svm_input and not svm:
        raise M3adError("--svm-input is for a refit; add --svm linear or --svm rbf")
    known = opened.document["threshold"]
    review: Threshold | None
    changed: dict[str, Any] = {}
    if data is None:
        scores, parts = list(known.get("validation_scores", [])), list(known.get("parts", []))
        reject = at_limit(known["value"] if set_to is None else set_to, scores)
        review = None if set_review is None else at_limit(set_review, scores)
    else:
        opened, parts, scores, reference = _scores(opened, data, svm, svm_input)
        changed["reference"] = reference.to_json() if reference else None
        if reference is None:
            talk.print(
                f"{len(parts)} good validation parts do not tell how frames look, a station watches no drift then; "
                f"{LEAST_FRAMES} are needed"
            )
        reject = fit_threshold(scores, false_alarm_rate)
        review = None if review_rate is None else fit_threshold(scores, review_rate)
    try:
        document = card(opened, reject, review, parts)
    except ValueError as error:
        raise M3adError(str(error)) from error
    stored = {**asdict(reject), "review": review.value if review else None}
    changed["threshold"] = {**stored, "validation_scores": scores, "parts": parts}
    opened.update(**changed)
    picture = plot or bundle.resolve().parent / "threshold.png"
    files = save_card(document, picture)
    if scores:
        save_score_plot({"validation, good": scores}, reject.value, picture)
        files.append(picture)
    if as_json:
        print_json({**stored, "card": document})
        return
    for name, limit in (("threshold", reject), ("review limit", review)):
        if limit:
            print_text(_told(name, limit))
    print_text(f"card: {', '.join(map(str, files))}")


def _told(name: str, limit: Threshold) -> str:
    if not limit.frames:
        return f"{name} {limit.value:.6g} ({limit.rule}): how many good parts exceed it is not known"
    return (
        f"{name} {limit.value:.6g} ({limit.rule}): {limit.false_alarms} of {limit.frames} good parts above it; "
        f"with {limit.confidence:.0%} confidence the false-alarm rate lies between {limit.false_alarm_rate_low:.3f} "
        f"and {limit.false_alarm_rate_high:.3f}"
    )


def _scores(
    opened: Bundle, data: Path, svm: Kernel | None, svm_input: SvmInput | None
) -> tuple[Bundle, list[str], list[float], Reference | None]:
    """The good validation parts, their scores and how they look, the SVM refitted first where asked."""
    samples = [s for s in find_samples(data, "validation") if s.is_good]
    if not samples:
        raise FrameError(f"{data} has no good validation parts; put some into {data / 'validation' / 'good'}")
    if svm:
        opened = _refit(opened, data, svm, svm_input)
    inspector = Inspector(opened, opened.manifest.layouts[-1])
    rig = opened.manifest.rig
    looks = Looks(inspector.preprocessing, Rig.from_json(rig, str(opened.path)) if rig else None)
    scores = []
    for sample in track(samples, "scoring", console=talk, transient=True):
        frame = read_sample(sample, inspector.preprocessing.camera)
        scores.append(inspector.inspect_prepared(prepare(frame, inspector.preprocessing)).score)
        looks.add(frame)
    parts = [f"{sample.split}/{sample.defect}/{sample.name}" for sample in samples]
    return opened, parts, scores, looks.reference()


def _refit(opened: Bundle, data: Path, kernel: Kernel, svm_input: SvmInput | None) -> Bundle:
    """Another SVM from training frames; the validation frames stay unseen for the threshold."""
    from m3ad_calibrate.svm import RBF_NU, config_of, fit_svm, write_svm

    config = config_of(opened, svm_input)
    good = [s for s in find_samples(data, "train") if s.is_good]
    chosen = [good[i] for i in sorted({round(i) for i in np.linspace(0, len(good) - 1, SVM_FRAMES)})]
    inspector = Inspector(opened, opened.manifest.layouts[-1])
    frames = track(chosen, "fitting the SVM", console=talk, transient=True)
    maps = [
        inspector.inspect(read_sample(s, inspector.preprocessing.camera), with_maps=True).score_maps
        for s in frames
    ]
    nu = 0.5 if kernel == "linear" else RBF_NU
    vote = fit_svm([m for m in maps if m is not None], config, kernel, nu)
    return write_svm(opened, vote, kernel, nu)
