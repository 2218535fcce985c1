"""The commands `refit` and `promote` of `m3ad-calibrate`: learning from what people said of a station's parts."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import M3adError
from m3ad.ledger import Ledger

from m3ad_calibrate import refit as learning
from m3ad_calibrate.options import BundleArg, Json
from m3ad_calibrate.refit import Settings, What
from m3ad_calibrate.refit_report import sentence

app = typer.Typer()


@app.command()
def refit(
    bundle: BundleArg,
    reviewed: Annotated[
        Path, typer.Option(metavar="LEDGER", help="`ledger.sqlite` of a station, which may be running")
    ],
    out: Annotated[
        Path | None, typer.Option(help="bundle to write; BUNDLE-refit beside it if left out")
    ] = None,
    what: Annotated[
        What,
        typer.Option(help="threshold alone, or also what good frames fit: svm, baseline (with svm), bank"),
    ] = "threshold",
    camera: Annotated[str | None, typer.Option(help="whose parts; not needed where there is one")] = None,
    held_out: Annotated[
        float, typer.Option(help="share of the reviewed good parts that nothing is fitted to")
    ] = 1 / 3,
    seed: Annotated[int, typer.Option(min=0, help="of which ones are held out")] = 0,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(help="wanted share of reviewed good parts called defects; none of them if left out"),
    ] = None,
    review_rate: Annotated[
        float | None, typer.Option(help="wanted share of reviewed good parts that somebody looks at")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a bundle that learned from the parts that people called good, beside BUNDLE; nothing is exchanged yet."""
    for option, share in (
        ("--held-out", held_out),
        ("--false-alarm-rate", false_alarm_rate),
        ("--review-rate", review_rate),
    ):
        if share is not None and not 0 < share < 1:
            raise M3adError(f"{option} must lie between 0 and 1, got {share}; 0.05 is one in twenty")
    source = Bundle.open(bundle)
    target = out or bundle.resolve().with_name(f"{bundle.resolve().name}-refit")
    settings = Settings(
        what=what,
        held_out=held_out,
        seed=seed,
        false_alarm_rate=false_alarm_rate,
        review_rate=review_rate,
    )
    with Ledger(reviewed) as ledger:
        report = learning.refit(source, ledger, _camera(ledger, camera), target, settings, talk.print)
    if as_json:
        print_json(report)
        return
    limits = f"limit of reject {report['before']['reject']:.6g} -> {report['after']['reject']:.6g}"
    print_text(f"{target}: {', '.join(report['what'])} from {len(report['fitted_to'])} good parts; {limits}")
    print_text(sentence(report))
    for note in report["notes"]:
        print_text(f"  {note}")
    print_text(f"report: {target}.refit.md; to use it: m3ad-calibrate promote {target} {bundle} --by NAME")


@app.command()
def promote(
    refitted: Annotated[Path, typer.Argument(metavar="REFITTED", help="what `refit` wrote")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the one it was made from, in use")],
    by: Annotated[str, typer.Option(metavar="NAME", help="who looked at the report and says so")],
    reason: Annotated[str | None, typer.Option(help="why, where more defects are missed")] = None,
) -> None:
    """Put REFITTED in BUNDLE's place, and keep BUNDLE beside it; a station takes it up at its next start."""
    kept = learning.promote(Bundle.open(refitted), bundle, by, reason)
    print_text(f"{bundle} is what {refitted} holds, by {by}'s word; what it was lies in {kept}")
    talk.print(
        "restart the station; write repositories (m3ad-triton write) and sign (m3ad-export sign) again"
    )


def _camera(ledger: Ledger, wanted: str | None) -> str:
    """The camera that is named, or the only one that has reviewed parts."""
    rows = ledger.query("SELECT DISTINCT camera FROM part WHERE said IS NOT NULL ORDER BY camera")
    cameras = [row[0] for row in rows]
    if wanted is not None:
        return wanted
    if len(cameras) > 1:
        raise M3adError(
            f"{ledger.path} has reviewed parts of several cameras; name one with --camera: {', '.join(cameras)}"
        )
    if not cameras:
        raise M3adError(f"{ledger.path} has no reviewed part; review some on the station's page")
    return str(cameras[0])
