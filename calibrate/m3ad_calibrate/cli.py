"""Command `m3ad-calibrate`: what is measured once per bundle and rig. Options and messages; the work is elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, run, talk
from m3ad.errors import FrameError, M3adError
from m3ad.frames import find_samples, read_sample
from m3ad.pipeline import Inspector
from m3ad_plugins import ops
from rich.progress import track

from m3ad_calibrate.threshold import fit_threshold, save_score_plot

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def calibrate() -> None:
    """Measure a bundle on real frames and write what was found into it."""


@app.command()
def threshold(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")],
    data: Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")],
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(help="wanted share of good parts called anomalous; none of them if left out"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of the scores; BUNDLE/../threshold.png if left out")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")] = False,
) -> None:
    """Set the verdict threshold from the validation split's good parts."""
    opened = Bundle.open(bundle)
    if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
        raise M3adError(
            f"--false-alarm-rate must lie between 0 and 1, got {false_alarm_rate}; 0.05 is one in twenty"
        )
    samples = [s for s in find_samples(data, "validation") if s.is_good]
    if not samples:
        raise FrameError(f"{data} has no good validation parts; put some into {data / 'validation' / 'good'}")
    inspector = Inspector(opened, ops, opened.manifest["layouts"][-1])
    frames = track(samples, "scoring", console=talk, transient=True)
    scores = [inspector.inspect(read_sample(sample)).score for sample in frames]
    fitted = fit_threshold(scores, false_alarm_rate)
    opened.update(threshold={**asdict(fitted), "validation_scores": scores})
    picture = plot or bundle.resolve().parent / "threshold.png"
    save_score_plot({"validation, good": scores}, fitted.value, picture)
    if as_json:
        print_json(asdict(fitted))
        return
    print_text(
        f"threshold {fitted.value:.6g} ({fitted.rule}): {fitted.false_alarms} of {fitted.frames} good parts above it; "
        f"with {fitted.confidence:.0%} confidence the false-alarm rate lies between {fitted.false_alarm_rate_low:.3f} "
        f"and {fitted.false_alarm_rate_high:.3f}\nscores: {picture}"
    )


def main() -> None:
    """Entry point of `m3ad-calibrate`."""
    run(app)
