"""Command `m3ad-calibrate`: what is measured once per bundle and rig. Options and messages; the work is elsewhere."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from m3ad.bundle import MANIFEST, Bundle, sha256_of, write_json
from m3ad.cli import print_json, print_text, run, talk
from m3ad.contract import Layout
from m3ad.errors import FrameError, M3adError
from m3ad.frames import Sample, find_samples
from m3ad.scored import lattice_of
from m3ad_export.graphs.plan import PlanPrecision, Rest, default_plan, read_plan

from m3ad_calibrate import record as recording
from m3ad_calibrate import region_commands, rig_commands, robustness_commands, threshold_commands
from m3ad_calibrate.gate import BUDGET
from m3ad_calibrate.modelopt import Engine
from m3ad_calibrate.ranges import EightBits, Method

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-export bundle` wrote")]
DataOpt = Annotated[Path, typer.Option(help="a category in MVTec 3D-AD or Eyecandies layout")]
PrecisionOpt = Annotated[PlanPrecision, typer.Option(help="fp16, bf16, int8 or fp8")]
RestOpt = Annotated[
    Rest, typer.Option(help="type of what INT8 and FP8 are not for: fp32 for CPUs, fp16 for TensorRT")
]
SmoothOpt = Annotated[
    bool, typer.Option("--smoothquant", help="move outliers behind LayerNorms into the weights")
]
BudgetOpt = Annotated[float, typer.Option(min=0, help="how far each anomaly metric may fall")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(rig_commands.app)
app.add_typer(threshold_commands.app)
app.add_typer(region_commands.app)
app.add_typer(robustness_commands.app)


@app.callback()
def calibrate() -> None:
    """Measure a bundle on real frames and write what was found into it."""


@app.command()
def record(
    bundle: BundleArg,
    data: DataOpt,
    megabytes: Annotated[int, typer.Option(min=1, help="of disk, at most")] = recording.DEFAULT_MEGABYTES,
    split: Annotated[str, typer.Option(help="train or validation; good frames only")] = "train",
) -> None:
    """Record the inputs of every graph from real frames into BUNDLE/calibration/recorded."""
    folder = recording.record(Bundle.open(bundle), data, megabytes, split, talk.print)
    size = sum(p.stat().st_size for p in folder.rglob("*.npy"))
    print_text(f"{folder}: {size / 1e6:.0f} MB")


@app.command()
def plan(
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="JSON file to write")],
    precision: PrecisionOpt,
    rest: RestOpt = "fp32",
) -> None:
    """Write the default precision plan, to be read and edited."""
    default_plan(precision, rest).write(out)
    print_text(f"{out}: written")


@app.command()
def quantize(
    bundle: BundleArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="bundle to write; an older one is replaced")],
    data: DataOpt,
    precision: Annotated[
        PlanPrecision | None, typer.Option(help="fp16, bf16, int8 or fp8; the plan's if left out")
    ] = None,
    method: Annotated[Method, typer.Option(help="how activations' limits are chosen")] = "max",
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="a precision plan; the default one if left out")
    ] = None,
    rest: RestOpt = "fp32",
    engine: Annotated[Engine, typer.Option(help="who places the Q/DQ pairs")] = "onnxruntime",
    smoothquant: SmoothOpt = False,
    layout: Annotated[Layout | None, typer.Option(help="one layout only; both if left out")] = None,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Write a quantized bundle to OUT and gate it on the test split; exit code 1 when it fails."""
    from m3ad_calibrate.quantize import Settings
    from m3ad_calibrate.quantize import quantize as write_quantized

    if (precision is None) == (plan_file is None):
        raise M3adError("name either --precision, for the default plan, or --plan, which has one")
    source = Bundle.open(bundle)
    chosen = read_plan(plan_file) if plan_file else default_plan(precision or "int8", rest)
    test = find_samples(data, "test")
    feeds, origin = recorded(source, data) if chosen.precision in ("int8", "fp8") else ({}, None)
    settings = Settings(method=method, engine=engine, smoothquant=smoothquant)
    written = write_quantized(
        source, out, chosen, feeds, settings, origin, [layout] if layout else [], talk.print
    )
    _gate(written, source, test, budget, as_json)


@app.command()
def gate(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="what `m3ad-calibrate quantize` or `lattice` wrote")
    ],
    against: Annotated[Path, typer.Option(help="the bundle it was made from")],
    data: DataOpt,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Measure what INT8, FP8 or a lattice cost on the test split, write it into BUNDLE; exit code 1 if too much."""
    _gate(Bundle.open(bundle), Bundle.open(against), find_samples(data, "test"), budget, as_json)


def recorded(source: Bundle, data: Path) -> tuple[dict[str, recording.Feeds], dict[str, Any]]:
    """The bundle's recorded inputs, recorded now from the training split if there are none, and where they are from."""
    manifest = source.path / recording.FOLDER / MANIFEST
    if not manifest.exists():
        recording.record(source, data, say=talk.print)
    feeds = recording.read_record(source)
    samples = [f"{s['split']}/{s['name']}" for s in json.loads(manifest.read_text())["samples"]]
    return feeds, {"record_sha256": sha256_of(manifest), "samples": samples}


def _gate(bundle: Bundle, source: Bundle, test: list[Sample], budget: float, as_json: bool) -> None:
    from m3ad_calibrate.gate import failures, summary
    from m3ad_calibrate.gate import gate as measure

    found = measure(bundle, source, test, budget, talk.print)
    bundle = bundle.update(gate=found)
    precision, lattice = bundle.document.get("precision"), bundle.document.get("lattice")
    if as_json:
        print_json({"precision": precision, "lattice": lattice, "gate": found})
    else:
        verdict = "passed its gate" if found["passed"] else "FAILED its gate"
        told = precision["type"] if precision else f"lattice {bundle.preprocessing.lattice}"
        print_text(summary(found, told))
        if precision:
            weights = precision["weight_bytes"]
            print_text(
                f"weights: {weights['quantized'] / 1e6:.1f} MB, {weights['ratio']:.1%} of the source's"
            )
        print_text(f"{bundle.path}: {verdict}")
    if failed := failures(found["figures"], budget):
        advice = (
            "Find a plan: m3ad-calibrate sensitivity"
            if precision
            else "Take a finer lattice: m3ad-calibrate lattice --lattice"
        )
        raise M3adError(f"{bundle.path} is not usable: {'; '.join(failed)}. {advice}")


@app.command()
def sensitivity(
    bundle: BundleArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="plan to write; its plot and figures lie beside it")] = Path(
        "plan.json"
    ),
    precision: Annotated[EightBits, typer.Option(help="int8 or fp8")] = "int8",
    method: Annotated[Method, typer.Option(help="how activations' limits are chosen")] = "max",
    rest: RestOpt = "fp32",
    smoothquant: SmoothOpt = False,
    frames: Annotated[int, typer.Option(min=1, help="good validation frames, each also with a defect")] = 4,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Rank layer groups by what quantizing them costs, and write the fastest plan within the budget."""
    from m3ad_calibrate.probe import Probe
    from m3ad_calibrate.quantize import Settings
    from m3ad_calibrate.sensitivity import Searcher, report, save_plot

    source = Bundle.open(bundle)
    feeds, _ = recorded(source, data)
    good = [s for s in find_samples(data, "validation") if s.is_good]
    chosen = [good[i] for i in sorted({round(i) for i in np.linspace(0, len(good) - 1, frames)})]
    probe = Probe(source, chosen, source.manifest.layouts)
    settings = Settings(method=method, smoothquant=smoothquant)
    search = Searcher(probe, feeds, default_plan(precision, rest), settings, budget).search(talk.print)
    search.plan.write(out)
    save_plot(search, out.with_suffix(".png"))
    write_json(out.with_suffix(".figures.json"), report(search))
    if as_json:
        print_json(report(search))
        return
    for f in search.findings:
        print_text(f"{f.quality.loss:6.2f} of the budget  {f.group.share:5.1%} of the work  {f.group.name}")
    share, loss = search.quantized_share, search.quality.loss
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
    frames: Annotated[int, typer.Option(min=1, help="good validation frames, each also with a defect")] = 4,
    budget: BudgetOpt = BUDGET,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="a second pass on a CPU gives the score of all pixels; fused layout"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a bundle that scores a lattice of the pixels, the coarsest within the budget, and gate it."""
    from m3ad_calibrate.lattice import measure, report, save_plot, write_lattice

    source = Bundle.open(bundle)
    test = find_samples(data, "test")
    good = {split: [s for s in find_samples(data, split) if s.is_good] for split in ("train", "validation")}
    if not good["validation"]:
        raise FrameError(f"{data} has no good validation parts; put some into {data / 'validation' / 'good'}")
    target = out or bundle.resolve().with_name(f"{bundle.resolve().name}-lattice")
    probed = sorted({round(i) for i in np.linspace(0, len(good["validation"]) - 1, frames)})
    picked = [good["validation"][i] for i in probed]
    try:
        tried = [lattice_of(wanted)] if wanted else None
    except ValueError as error:
        raise M3adError(f"--{error}") from error
    trials = measure(source, picked, budget, tried, talk.print)
    fitting = [trial for trial in trials if trial.quality.loss <= 1] if not wanted else trials
    if not fitting:
        raise M3adError(f"no lattice stays within the budget of {budget:g}; {source.path} scores all pixels")
    chosen = min(fitting, key=lambda trial: trial.share)
    told = report(trials)
    written = write_lattice(
        source, target, chosen.lattice, good["train"], good["validation"], told, refine=refine
    )
    save_plot(trials, chosen, written.path.parent / f"{written.path.name}.png")
    if source.manifest.threshold.review is not None and not refine:
        talk.print(
            "the review limit was for other scores and is gone: m3ad-calibrate threshold --review-rate"
        )
    _gate(written, source, test, budget, as_json)


def main() -> None:
    """Entry point of `m3ad-calibrate`."""
    run(app)
