"""`m3ad-client bench`: speed and memory of forms side by side, or one row a method."""

import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer
from m3ad import cli as shared
from m3ad.atomic import file_beside
from m3ad.bundle import Bundle
from m3ad.contract import LAYOUTS
from m3ad_runtime.engine_choice import RUNTIMES

from m3ad_client import report, table_report
from m3ad_client.cameras_command import Load, bench_cameras
from m3ad_client.candidates import Candidates
from m3ad_client.infer import find_inputs
from m3ad_client.measure import artefacts, run_bench
from m3ad_client.method_table import entries, method_table
from m3ad_client.options import (
    DEFAULT_URL,
    Ca,
    Cert,
    Json,
    Key,
    Markdown,
    Model,
    Paths,
    Split,
    Timeout,
    UseTls,
    print_tables,
    tls_of,
    warn_unless_usable,
)
from m3ad_client.runner import opened_inspector
from m3ad_client.table_picture import picture as draw
from m3ad_client.table_picture import points_of
from m3ad_client.triton import TritonInspector

BASELINES = ("dense", "cfm", "fused")
Device = Literal["cpu", "cuda"]


def bench(
    paths: Paths,
    frames: Annotated[int, typer.Option(help="measured in each region", min=1)] = 30,
    warmup: Annotated[int, typer.Option(help="run before, unmeasured; at least 1", min=1)] = 5,
    split: Split = "test",
    bundle: Annotated[
        list[Path] | None, typer.Option(help="measure this bundle's in-process runner; repeat for several")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="fused or chain, of the in-process runner; repeat for both")
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"of the in-process runner, auto if left out: {', '.join(RUNTIMES)}; repeat for several"
        ),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a Triton to measure; repeat for several")
    ] = None,
    model: Model = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="plain PyTorch: dense, cfm or fused; repeat for several")
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="what `m3ad-export train` wrote; the baselines run its networks")
    ] = None,
    device: Annotated[Device, typer.Option(help="where the PyTorch forms run")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="of each in-process form; every core if left out", min=1)
    ] = None,
    beside: Annotated[
        int, typer.Option(min=0, help="processes that each keep a core busy while frames are measured")
    ] = 0,
    cameras: Annotated[
        int | None, typer.Option(min=1, help="streams at once at one bundle or server, beside one stream")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="of --cameras: frames a second and camera that come by themselves, too (Poisson)"),
    ] = None,
    room: Annotated[
        int | None, typer.Option(help="of --cameras: frames that may wait; twice the cameras if left out")
    ] = None,
    tls: UseTls = False,
    ca: Ca = None,
    key: Key = None,
    cert: Cert = None,
    timeout_s: Timeout = 60.0,
    table: Annotated[
        bool,
        typer.Option("--table", help="one row a method, what papers say of it beside what its bundle does"),
    ] = False,
    methods: Annotated[
        str | None, typer.Option(help="of --table, with commas between them; all if left out")
    ] = None,
    bundles: Annotated[
        Path | None, typer.Option(help="of --table: a folder with METHOD/bundle of each method")
    ] = None,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="of --table: train what is missing in --bundles, with few steps"),
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="of --table: an SVG of accuracy against time to write")
    ] = None,
    as_json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Speed and memory, one frame at a time, all forms on the same frames in turn; the paper's table beside.

    The first form (bundle, then server, then baseline) is the reference of the ratios. Inference only is what CFM
    timed: tensors ready -> map. End to end is what a line feels: files -> verdict. Forms of one name are told apart
    in the tables: `fused (in process)`, `fused (PyTorch)`, two servers by their URLs, two bundles by their folders.
    With --table every method has a row: published figures, measured ones, and metrics where the frames are labelled.
    With --cameras several streams share one bundle or server, in turn with one stream, and every answer is checked.
    """
    count = threads or len(os.sched_getaffinity(0))
    if not table and (methods or bundles or prepare or picture):
        raise typer.BadParameter("--methods, --bundles, --prepare and --picture need --table")
    if table:
        if url or baseline or layout or runtime or beside or cameras:
            raise typer.BadParameter(
                "--table measures bundles on the CPU, without --url, --baseline, --layout, --runtime, --beside or "
                "--cameras"
            )
        if prepare and bundles is None:
            raise typer.BadParameter("--prepare needs --bundles, the folder to train in")
        chosen_methods = [name.strip() for name in methods.split(",")] if methods else []
        samples, say = find_inputs(paths, split), shared.talk.print
        rows = entries(chosen_methods, bundle or (), bundles, paths[0] if prepare else None, say)
        found = method_table(rows, samples, frames, warmup, count, say)
        if picture and points_of(found):
            with file_beside(picture) as temporary:
                temporary.write_text(draw(found), encoding="utf-8")
        if as_json:
            shared.print_json(found)
        else:
            shared.print_text(table_report.markdown(found) if markdown else table_report.terminal(found))
        return
    if cameras is None and not (rate is None and room is None):
        raise typer.BadParameter("--rate and --room need --cameras")
    if layout and not bundle:
        raise typer.BadParameter("--layout is for --bundle; a server has its own layout")
    if runtime and not bundle:
        raise typer.BadParameter("--runtime is for --bundle; a server has its own runtime")
    if (baseline is None) != (detector is None):
        raise typer.BadParameter("--baseline and --detector go together")
    for option, chosen, known in (
        ("layout", layout, LAYOUTS),
        ("runtime", runtime, RUNTIMES),
        ("baseline", baseline, BASELINES),
    ):
        for wrong in {*(chosen or ())} - {*known}:
            raise typer.BadParameter(f"--{option} {wrong} is unknown, expected {', '.join(known)}")
    samples = find_inputs(paths, split)

    def connect(address: str) -> TritonInspector:
        return TritonInspector(address, model, tls=tls_of(tls, ca, key, cert), timeout_s=timeout_s)

    if cameras is not None:
        if baseline or max(len(bundle or ()) + len(url or ()), len(layout or ()), len(runtime or ())) > 1:
            raise typer.BadParameter(
                "--cameras measures one bundle in one layout and runtime, or one server, and no --baseline"
            )
        waiting = 2 * cameras if room is None else room
        load = Load(cameras=cameras, frames=frames, warmup=warmup, rate=rate, room=waiting, beside=beside)
        with ExitStack() as stack:
            if bundle:
                unloaded = Bundle.read(bundle[0])
                warn_unless_usable(unloaded)
                one, how = (layout or [unloaded.layout()])[0], (runtime or ["auto"])[0]
                here = stack.enter_context(opened_inspector(bundle[0], one, count, how))
                bench_cameras([here], samples, load, as_json, markdown)
            else:
                address = (url or [DEFAULT_URL])[0]
                served = [stack.enter_context(connect(address)) for _ in range(cameras)]
                bench_cameras(served, samples, load, as_json, markdown)
        return
    opened = [_opened(path) for path in bundle or ()]
    with Candidates() as candidates:
        for each in opened:
            for one, how in itertools.product(layout or [each.layout()], runtime or ["auto"]):
                candidates.add_bundle(each.path, one, count, how)
        for address in url or (() if bundle or baseline else (DEFAULT_URL,)):
            candidates.add_server(connect(address))
        for form in baseline or ():
            assert detector is not None
            candidates.add_baseline(form, detector, count, device)
        result = run_bench(candidates.all, samples, frames, warmup, shared.talk.print, beside)
    if opened:
        result["artefacts"] = artefacts(opened[0])
    print_tables(result, report.bench_tables([result]), as_json, markdown)


def _opened(path: Path) -> Bundle:
    """The bundle, verified, with a warning when it did not pass its gate."""
    bundle = Bundle.open(path)
    warn_unless_usable(bundle)
    return bundle
