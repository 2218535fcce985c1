"""The command `regions` of `m3ad-calibrate`: which pixels of a rig's frames count, with the threshold that follows."""

import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import FrameError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.preprocess import prepare
from m3ad.reference import Looks
from m3ad.regions import read_regions
from m3ad.rig import Rig
from m3ad.scale import extent
from m3ad_runtime.pipeline import Inspector
from rich.progress import track

from m3ad_calibrate.threshold import fit_threshold

app = typer.Typer()


@app.command("regions")
def regions_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")],
    data: Annotated[Path, typer.Option(help="a category, whose validation parts set the threshold anew")],
    include: Annotated[
        list[Path] | None, typer.Option(help="mask of what is looked at, white; repeat for several")
    ] = None,
    ignore: Annotated[
        list[Path] | None, typer.Option(help="mask of what is not looked at, white; repeat for several")
    ] = None,
    polygons: Annotated[
        Path | None, typer.Option(help="JSON of width, height, include and ignore, polygons in pixels")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="look at whole frames again")] = False,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(help="wanted share of good parts called anomalous; none of them if left out"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
) -> None:
    """Keep regions in BUNDLE: other pixels are nothing to any later frame; the threshold is fitted anew."""
    opened = Bundle.open(bundle)
    if clear == bool(include or ignore or polygons):
        raise M3adError("give regions by --include, --ignore or --polygons, or take them away by --clear")
    if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
        raise M3adError(f"--false-alarm-rate must lie between 0 and 1, got {false_alarm_rate}")
    regions = None if clear else read_regions(include or [], ignore or [], polygons)
    samples = [s for s in find_samples(data, "validation") if s.is_good]
    if not samples:
        raise FrameError(f"{data} has no good validation parts; put some into {data / 'validation' / 'good'}")
    settings = replace(opened.preprocessing, regions=regions, extent_m=None)
    changed = Bundle.of_document(opened.path, {**opened.document, "preprocessing": settings.to_json()})
    inspector = Inspector(changed)
    scores, extents = [], []
    rig = opened.manifest.rig
    looks = Looks(settings, Rig.from_json(rig, str(bundle)) if rig else None)
    for sample in track(samples, "scoring", console=talk, transient=True):
        frame = read_sample(sample, settings.camera)
        prepared = prepare(frame, settings)
        looks.add(frame)
        extents.append(extent(prepared.points))
        scores.append(inspector.inspect_prepared(prepared).score)
    fitted = fit_threshold(scores, false_alarm_rate)
    settings = replace(settings, extent_m=statistics.median(extents))
    parts = [f"{sample.split}/{sample.defect}/{sample.name}" for sample in samples]
    record = {**asdict(fitted), "review": None, "validation_scores": scores, "parts": parts}
    had_review = opened.manifest.threshold.review is not None
    reference = looks.reference()
    opened.update(
        preprocessing=settings.to_json(),
        threshold=record,
        reference=reference.to_json() if reference else None,
    )
    share = float(regions.mask().mean()) if regions else 1.0
    if as_json:
        print_json({"kept": share, **asdict(fitted)})
        return
    print_text(
        f"{bundle}: {share:.1%} of a frame's pixels count; threshold {fitted.value:.6g} ({fitted.rule})"
    )
    if had_review:
        talk.print(
            "the review limit was for other scores and is gone: m3ad-calibrate threshold --review-rate"
        )
    talk.print("repositories carry their own: m3ad-triton write BUNDLE REPO")
