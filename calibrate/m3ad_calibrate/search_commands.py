"""Commands of `m3ad-calibrate` that search: a precision plan, a lattice, or both at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from m3ad.bundle import MANIFEST, Bundle, require_place, write_json
from m3ad.cli import print_json, print_text, talk
from m3ad.errors import FrameError, M3adError
from m3ad.frames import Sample, find_samples
from m3ad.scored import Lattice, lattice_of
from m3ad_export.graphs.plan import default_plan

from m3ad_calibrate.gate import BUDGET
from m3ad_calibrate.judge import judge
from m3ad_calibrate.options import (
    BudgetOpt,
    BundleArg,
    DataOpt,
    EightBitsOpt,
    FramesOpt,
    Json,
    MethodOpt,
    RestOpt,
    SmoothOpt,
)
from m3ad_calibrate.record import recorded

app = typer.Typer()
REVIEW_IS_GONE = "the review limit was for other scores and is gone: m3ad-calibrate threshold --review-rate"


@app.command()
def sensitivity(
    bundle: BundleArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="plan to write; its plot and figures lie beside it")] = Path(
        "plan.json"
    ),
    precision: EightBitsOpt = "int8",
    method: MethodOpt = "max",
    rest: RestOpt = "fp32",
    smoothquant: SmoothOpt = False,
    frames: FramesOpt = 4,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Rank layer groups by what quantizing them costs, and write the fastest plan within the budget."""
    from m3ad_calibrate.probe import Probe
    from m3ad_calibrate.quantize import Settings
    from m3ad_calibrate.sensitivity import Searcher, report, save_plot

    source = Bundle.open(bundle)
    feeds, _ = recorded(source, data, talk.print)
    probe = Probe(source, spread(good_frames(data, "validation"), frames), source.manifest.layouts)
    settings = Settings(method=method, smoothquant=smoothquant)
    found = Searcher(probe, feeds, default_plan(precision, rest), settings, budget).search(talk.print)
    found.plan.write(out)
    save_plot(found, out.with_suffix(".png"))
    write_json(out.with_suffix(".figures.json"), report(found))
    if as_json:
        print_json(report(found))
        return
    for f in found.findings:
        print_text(f"{f.quality.loss:6.2f} of the budget  {f.group.share:5.1%} of the work  {f.group.name}")
    share, loss = found.quantized_share, found.quality.loss
    print_text(f"{out}: {share:.0%} of the multiply-adds in {precision}, {loss:.2f} of the budget")


@app.command()
def lattice(
    bundle: BundleArg,
    data: DataOpt,
    out: Annotated[Path | None, typer.Option(help="bundle to write; BUNDLE-lattice if left out")] = None,
    wanted: Annotated[
        str | None,
        typer.Option("--lattice", help="half, or k for every k-th row and column; found if left out"),
    ] = None,
    frames: FramesOpt = 4,
    budget: BudgetOpt = BUDGET,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="a second pass on a CPU gives the score of all pixels; fused layout"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a bundle that scores a lattice of the pixels, the coarsest within the budget, and gate it."""
    from m3ad_calibrate.lattice import report, save_plot, write_lattice
    from m3ad_calibrate.lattice_probe import measure

    source = Bundle.open(bundle)
    test = find_samples(data, "test")
    train, validation = good_frames(data, "train"), required_validation(data)
    target = out or bundle.resolve().with_name(f"{bundle.resolve().name}-lattice")
    trials = measure(source, spread(validation, frames), budget, named(wanted), talk.print)
    fitting = [trial for trial in trials if trial.quality.loss <= 1] if not wanted else trials
    if not fitting:
        raise M3adError(f"no lattice stays within the budget of {budget:g}; {source.path} scores all pixels")
    chosen = min(fitting, key=lambda trial: trial.share)
    told = report(trials)
    written = write_lattice(source, target, chosen.lattice, train, validation, told, refine=refine)
    save_plot(trials, chosen, written.path.parent / f"{written.path.name}.png")
    if source.manifest.threshold.review is not None and not refine:
        talk.print(REVIEW_IS_GONE)
    judge(written, source, test, budget, as_json)


@app.command()
def search(
    bundle: BundleArg,
    data: DataOpt,
    out: Annotated[Path | None, typer.Option(help="bundle to write; BUNDLE-fast if left out")] = None,
    wanted: Annotated[
        str | None,
        typer.Option("--lattice", help="all, half or k, to search for its plan alone; found if left out"),
    ] = None,
    precision: EightBitsOpt = "int8",
    method: MethodOpt = "max",
    rest: RestOpt = "fp32",
    smoothquant: SmoothOpt = False,
    frames: FramesOpt = 4,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Write the cheapest combination of a lattice and a precision plan within the budget, and gate it."""
    from m3ad_calibrate import joint
    from m3ad_calibrate.lattice_probe import LatticeProbe, verify_source
    from m3ad_calibrate.probe import Probe
    from m3ad_calibrate.quantize import Settings
    from m3ad_calibrate.sensitivity import Searcher

    source, lattices = Bundle.open(bundle), named(wanted)
    verify_source(source)
    target = out or bundle.resolve().with_name(f"{bundle.resolve().name}-fast")
    require_place(target / MANIFEST)
    test, train, validation = (
        find_samples(data, "test"),
        good_frames(data, "train"),
        required_validation(data),
    )
    feeds, origin = recorded(source, data, talk.print)
    picked = spread(validation, frames)
    probe = Probe(source, picked, source.manifest.layouts)
    settings = Settings(method=method, smoothquant=smoothquant)
    searcher = Searcher(probe, feeds, default_plan(precision, rest), settings, budget)
    scored = LatticeProbe(source, picked, lambda changed: probe.walk("fused", changed))
    tried = joint.search(searcher, scored, lattices, talk.print)
    chosen = joint.cheapest(tried)
    if chosen is None:
        raise M3adError(f"lattice {wanted} does not stay within the budget of {budget:g}; take a finer one")
    told = joint.report(tried)
    written = joint.write(
        source, target, chosen, feeds, settings, origin, train, validation, told, talk.print
    )
    joint.save_plot(tried, chosen, written.path.parent / f"{written.path.name}.png")
    talk.print(f"chosen: {chosen.told}, {chosen.work:.2f} of the work")
    if source.manifest.threshold.review is not None:
        talk.print(REVIEW_IS_GONE)
    judge(written, source, test, budget, as_json)


def named(wanted: str | None) -> list[Lattice] | None:
    """The one lattice that `--lattice` names; None without it."""
    try:
        return [lattice_of(wanted)] if wanted else None
    except ValueError as error:
        raise M3adError(f"--{error}") from error


def good_frames(data: Path, split: str) -> list[Sample]:
    """The good frames of a split."""
    return [s for s in find_samples(data, split) if s.is_good]


def required_validation(data: Path) -> list[Sample]:
    """The good validation frames, of which there must be some."""
    if good := good_frames(data, "validation"):
        return good
    raise FrameError(f"{data} has no good validation parts; put some into {data / 'validation' / 'good'}")


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most so many of the samples, evenly spread."""
    places = np.linspace(0, len(samples) - 1, count) if samples else ()
    return [samples[i] for i in sorted({round(place) for place in places})]
