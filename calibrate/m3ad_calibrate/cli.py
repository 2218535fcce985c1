"""Command `m3ad-calibrate`: what is measured once per bundle and rig. Options and messages; the work is elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad.bundle import Bundle
from m3ad.cli import print_text, run, talk
from m3ad.contract import Layout
from m3ad.errors import M3adError
from m3ad.frames import find_samples
from m3ad_export.graphs.plan import PlanPrecision, default_plan, read_plan

from m3ad_calibrate import record as recording
from m3ad_calibrate import (
    refit_commands,
    region_commands,
    rig_commands,
    robustness_commands,
    search_commands,
    threshold_commands,
)
from m3ad_calibrate.gate import BUDGET
from m3ad_calibrate.judge import judge
from m3ad_calibrate.modelopt import Engine
from m3ad_calibrate.options import (
    BudgetOpt,
    BundleArg,
    DataOpt,
    Json,
    MethodOpt,
    PrecisionOpt,
    RestOpt,
    SmoothOpt,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(search_commands.app)
app.add_typer(rig_commands.app)
app.add_typer(threshold_commands.app)
app.add_typer(region_commands.app)
app.add_typer(refit_commands.app)
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
    method: MethodOpt = "max",
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
    feeds, origin = (
        recording.recorded(source, data, talk.print) if chosen.precision in ("int8", "fp8") else ({}, None)
    )
    settings = Settings(method=method, engine=engine, smoothquant=smoothquant)
    written = write_quantized(
        source, out, chosen, feeds, settings, origin, [layout] if layout else [], talk.print
    )
    judge(written, source, test, budget, as_json)


@app.command()
def gate(
    bundle: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="what `m3ad-calibrate quantize`, `lattice` or `search` wrote"),
    ],
    against: Annotated[Path, typer.Option(help="the bundle it was made from")],
    data: DataOpt,
    budget: BudgetOpt = BUDGET,
    as_json: Json = False,
) -> None:
    """Measure what INT8, FP8 or a lattice cost on the test split, write it into BUNDLE; exit code 1 if too much."""
    judge(Bundle.open(bundle), Bundle.open(against), find_samples(data, "test"), budget, as_json)


def main() -> None:
    """Entry point of `m3ad-calibrate`."""
    run(app)
