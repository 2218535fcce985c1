"""Command `m3ad-client`: inspect parts, run a station, evaluate a test split, measure speed and memory."""

import itertools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from m3ad import cli as shared
from m3ad.atomic import file_beside
from m3ad.bundle import Bundle
from m3ad.contract import LAYOUTS, Layout
from m3ad.errors import ArtifactError, FrameError
from m3ad.frames import find_samples
from m3ad.limits import Limits
from m3ad.overlay import defect_line
from m3ad.preprocess import Modality
from m3ad.signature import verify_signature
from m3ad_runtime.engine_choice import RUNTIMES, Runtime
from m3ad_runtime.pipeline import Inspector
from rich.progress import track

from m3ad_client import report, table_report
from m3ad_client.candidates import Candidates
from m3ad_client.check_frames import check_frames, failing
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.infer import FrameResult, find_inputs, inspect_samples
from m3ad_client.measure import artefacts, run_bench
from m3ad_client.method_table import entries, method_table
from m3ad_client.saved import read_result as _read_result
from m3ad_client.station import command as station_command
from m3ad_client.table_picture import picture as draw
from m3ad_client.table_picture import points_of
from m3ad_client.triton import Tls, TritonInspector

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(station_command.app)

Paths = Annotated[
    list[Path], typer.Argument(metavar="RGB XYZ | FOLDER", help="one frame's two files, or a folder")
]
Data = Annotated[Path, typer.Argument(help="a category's folder (MVTec 3D-AD or Eyecandies layout)")]
Split = Annotated[str, typer.Option(help="train, validation or test, when the folder has splits")]
Url = Annotated[str, typer.Option(help="HOST:PORT of Triton's gRPC endpoint")]
Model = Annotated[str | None, typer.Option(help="the category to use; not needed when the server has one")]
BundleOption = Annotated[
    Path | None, typer.Option(help="inspect in this process with this bundle, without a server")
]
LayoutOption = Annotated[
    Layout | None,
    typer.Option(help="layout to run, the one to ship if left out; with --bundle only, a server has its own"),
]
RuntimeOption = Annotated[
    Runtime | None,
    typer.Option(
        help="with --bundle: engines on this machine's GPU or ONNX Runtime; auto, which is meant if left out, takes "
        "engines if the bundle has some that run here"
    ),
]
BASELINES = ("dense", "cfm", "fused")
Device = Literal["cpu", "cuda"]
UseTls = Annotated[bool, typer.Option("--tls", help="connect over TLS")]
Ca = Annotated[Path | None, typer.Option(help="certificate authority to trust", exists=True)]
Key = Annotated[Path | None, typer.Option(help="client key", exists=True)]
Cert = Annotated[Path | None, typer.Option(help="client certificate", exists=True)]
Timeout = Annotated[float, typer.Option(help="for each request")]
Retries = Annotated[
    int,
    typer.Option(
        help="of a request while the server is started again or busy; waits 0.5 s, 1 s .. 5 s", min=0
    ),
]
Reject = Annotated[
    float | None,
    typer.Option(
        "--threshold", help="score above which a part is defective; the bundle's or server's if left out"
    ),
]
Review = Annotated[
    float | None,
    typer.Option(help="score above which somebody looks at a part; the bundle's or server's if left out"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Markdown = Annotated[bool, typer.Option("--markdown", help="print Markdown tables")]

DEFAULT_URL = "localhost:8001"


@app.command()
def infer(
    paths: Paths,
    out: Annotated[Path | None, typer.Option(help="folder for overlays (PNG) and raw maps (NPY)")] = None,
    split: Split = "test",
    url: Url = DEFAULT_URL,
    model: Model = None,
    bundle: BundleOption = None,
    layout: LayoutOption = None,
    runtime: RuntimeOption = None,
    threshold: Reject = None,
    review: Review = None,
    tls: UseTls = False,
    ca: Ca = None,
    key: Key = None,
    cert: Cert = None,
    timeout_s: Timeout = 60.0,
    retries: Retries = 6,
    require_signature: Annotated[
        Path | None,
        typer.Option(
            metavar="PUBKEY", help="with --bundle: take it only if this key (Ed25519, PEM) signed it"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Inspect one frame or every frame of a folder: score, verdict, overlay and raw map."""
    if require_signature:
        if bundle is None:
            raise typer.BadParameter(
                "--require-signature goes with --bundle; a server checks its own: m3ad-triton serve"
            )
        verify_signature(bundle, require_signature)
    samples = find_inputs(paths, split)
    server = _Server(url, model, _tls(tls, ca, key, cert), timeout_s, retries)
    with _inspector(bundle, layout, runtime, server) as inspector:
        inspector.limits = _moved(inspector.limits, threshold, review)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        results = []
        for result in inspect_samples(inspector, samples, out):
            results.append(result)
            if not as_json:
                _print_result(result)
        record, limits = inspector.record, inspector.limits
    if as_json:
        shared.print_json(
            {
                "category": record.category,
                "threshold": limits.reject,
                "review": limits.review,
                "weights": record.weights,
                "frames": [{k: v for k, v in asdict(r).items() if v is not None} for r in results],
            }
        )
    unsaved = [result for result in results if result.not_saved]
    if unsaved:
        raise ArtifactError(
            f"what was found in {len(unsaved)} of {len(results)} frames could not be saved: {unsaved[0].not_saved}; "
            "make room there, or name another folder with --out"
        )
    failed = [result for result in results if result.error]
    if failed:
        raise FrameError(f"{len(failed)} of {len(results)} frames could not be inspected: {failed[0].error}")


@app.command(name="eval")
def evaluate(
    data: Data,
    split: Split = "test",
    maps: Annotated[bool, typer.Option("--maps", help="also judge every score map alone")] = False,
    without: Annotated[
        Modality | None, typer.Option(help="mask a modality out of every frame: rgb to one colour, xyz flat")
    ] = None,
    url: Url = DEFAULT_URL,
    model: Model = None,
    bundle: BundleOption = None,
    layout: LayoutOption = None,
    runtime: RuntimeOption = None,
    threshold: Reject = None,
    review: Review = None,
    tls: UseTls = False,
    ca: Ca = None,
    key: Key = None,
    cert: Cert = None,
    timeout_s: Timeout = 60.0,
    retries: Retries = 6,
    as_json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Metrics over a test split: I-AUROC, P-AUROC, AUPRO@30/10/5/1 in both named modes, per defect kind."""
    samples = find_samples(data, split)
    server = _Server(url, model, _tls(tls, ca, key, cert), timeout_s, retries)
    with _inspector(bundle, layout, runtime, server) as inspector:
        inspector.limits = _moved(inspector.limits, threshold, review)
        frames = track(samples, "inspecting", console=shared.talk, transient=True)
        found = evaluate_samples(inspector, frames, with_maps=maps, without=without)
        record, limits = inspector.record, inspector.limits
    result = {
        "category": record.category,
        "split": f"{split} without {without}" if without else split,
        "threshold": limits.reject,
        "weights": record.weights,
        **found,
    }
    _print(result, report.eval_tables(result), as_json, markdown)


@app.command()
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
    """
    count = threads or len(os.sched_getaffinity(0))
    if not table and (methods or bundles or prepare or picture):
        raise typer.BadParameter("--methods, --bundles, --prepare and --picture need --table")
    if table:
        if url or baseline or layout or runtime or beside:
            raise typer.BadParameter(
                "--table measures bundles on the CPU, without --url, --baseline, --layout, --runtime or --beside"
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
    opened = [_opened(path) for path in bundle or ()]
    with Candidates() as candidates:
        for each in opened:
            for one, how in itertools.product(layout or [each.layout()], runtime or ["auto"]):
                candidates.add_bundle(each.path, one, count, how)
        for address in url or (() if bundle or baseline else (DEFAULT_URL,)):
            candidates.add_server(
                TritonInspector(address, model, tls=_tls(tls, ca, key, cert), timeout_s=timeout_s)
            )
        for form in baseline or ():
            assert detector is not None
            candidates.add_baseline(form, detector, count, device)
        result = run_bench(candidates.all, samples, frames, warmup, shared.talk.print, beside)
    if opened:
        result["artefacts"] = artefacts(opened[0])
    _print(result, report.bench_tables([result]), as_json, markdown)


@app.command(name="check-frames")
def check(
    folder: Annotated[Path, typer.Argument(help="a category, or a folder of images and clouds")],
    hole: Annotated[
        float | None, typer.Option(help="a number that stands for `not measured`, as in `m3ad-export train`")
    ] = None,
    as_json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Say what is wrong with frames before anybody trains on them; exit code 1 when something is."""
    checks = check_frames(
        folder,
        hole=hole,
        track=lambda samples: track(samples, "looking at frames", console=shared.talk, transient=True),
    )
    failed = failing(checks)
    table = report.Table(str(folder), ["check", "", "found", "frames"], [check.cells() for check in checks])
    _print({"ok": not failed, "checks": [asdict(check) for check in checks]}, [table], as_json, markdown)
    if failed:
        raise FrameError(f"{folder} cannot be trained on as it is: look at {', '.join(failed)}")


@app.command(name="report")
def show(
    files: Annotated[
        list[Path], typer.Argument(metavar="JSON...", help="what `eval --json` and `bench --json` wrote")
    ],
    markdown: Markdown = False,
) -> None:
    """Show saved results again, several benchmarks in one table: the same rows, side by side."""
    results = [_read_result(path) for path in files]
    benches = [result for result in results if "rows" in result]
    tables = [table for result in results if "metrics" in result for table in report.eval_tables(result)]
    _print({}, [*tables, *(report.bench_tables(benches) if benches else [])], False, markdown)


class _Server(NamedTuple):
    url: str
    model: str | None
    tls: Tls | None
    timeout_s: float
    retries: int

    def open(self) -> TritonInspector:
        return TritonInspector(
            self.url, self.model, tls=self.tls, timeout_s=self.timeout_s, retries=self.retries
        )


def _inspector(
    bundle: Path | None, layout: Layout | None, runtime: Runtime | None, server: _Server
) -> Inspector | TritonInspector:
    if bundle is not None:
        _warn_unless_usable(Bundle.read(bundle))
        return Inspector.open(bundle, layout, runtime=runtime or "auto", say=shared.talk.print)
    if runtime is not None:
        raise typer.BadParameter("--runtime is for --bundle; a server has its own runtime")
    return server.open()


def _moved(limits: Limits, threshold: float | None, review: float | None) -> Limits:
    try:
        return limits.moved(threshold, review)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _opened(path: Path) -> Bundle:
    """The bundle, verified, with a warning when it did not pass its gate."""
    bundle = Bundle.open(path)
    _warn_unless_usable(bundle)
    return bundle


def _warn_unless_usable(bundle: Bundle) -> None:
    try:
        bundle.verify_usable()
    except ArtifactError as error:
        shared.talk.print(f"warning: {error}")


def _tls(use: bool, ca: Path | None, key: Path | None, cert: Path | None) -> Tls | None:
    if not use and (ca or key or cert):
        raise typer.BadParameter("--ca, --key and --cert need --tls")
    if (key is None) != (cert is None):
        raise typer.BadParameter("--key and --cert go together")
    return Tls(ca=ca, key=key, cert=cert) if use else None


def _print_result(result: FrameResult) -> None:
    if result.error:
        shared.print_text(f"{result.frame}: not inspected: {result.error}")
        return
    verdict = "good" if result.verdict == "good" else str(result.verdict).upper()
    picture = f", {result.overlay}" if result.overlay else ""
    picture = f", not saved: {result.not_saved}" if result.not_saved else picture
    shared.print_text(
        f"{result.frame}: {verdict}, score {result.score:.4f}, {result.latency_ms:.0f} ms{picture}"
    )
    for number, defect in enumerate(result.defects or (), 1):
        shared.print_text(f"  {number}  {defect_line(defect)}")


def _print(result: dict[str, Any], tables: list[report.Table], as_json: bool, markdown: bool) -> None:
    if as_json:
        shared.print_json(result)
    elif markdown:
        shared.print_text("\n".join(table.to_markdown() for table in tables))
    else:
        console = shared.plain_console()
        for table in tables:
            console.print(table.to_rich(), "", soft_wrap=False)


def main() -> None:
    """Run the command."""
    shared.run(app)
