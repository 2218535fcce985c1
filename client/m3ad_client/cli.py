"""Command `m3ad-client`: inspect parts, run a station, evaluate a test split, measure speed and memory."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from m3ad import cli as shared
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, FrameError
from m3ad.frame_settings import Modality
from m3ad.frames import find_samples
from m3ad.limits import Limits
from m3ad.overlay import defect_line
from m3ad.signature import verify_signature
from m3ad_runtime.engine_choice import Runtime
from m3ad_runtime.pipeline import Inspector
from rich.progress import track

from m3ad_client import report
from m3ad_client.bench_command import bench
from m3ad_client.check_frames import check_frames, failing
from m3ad_client.evaluate import evaluate_samples
from m3ad_client.infer import FrameResult, find_inputs, inspect_samples
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
from m3ad_client.replay_command import replay
from m3ad_client.saved import read_result as _read_result
from m3ad_client.station import command as station_command
from m3ad_client.triton import Tls, TritonInspector

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(station_command.app)

Data = Annotated[Path, typer.Argument(help="a category's folder (MVTec 3D-AD or Eyecandies layout)")]
Url = Annotated[str, typer.Option(help="HOST:PORT of Triton's gRPC endpoint")]
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
    server = _Server(url, model, tls_of(tls, ca, key, cert), timeout_s, retries)
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
    server = _Server(url, model, tls_of(tls, ca, key, cert), timeout_s, retries)
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
    print_tables(result, report.eval_tables(result), as_json, markdown)


app.command()(bench)
app.command()(replay)


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
    print_tables(
        {"ok": not failed, "checks": [asdict(check) for check in checks]}, [table], as_json, markdown
    )
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
    print_tables({}, [*tables, *(report.bench_tables(benches) if benches else [])], False, markdown)


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
        warn_unless_usable(Bundle.read(bundle))
        return Inspector.open(bundle, layout, runtime=runtime or "auto", say=shared.talk.print)
    if runtime is not None:
        raise typer.BadParameter("--runtime is for --bundle; a server has its own runtime")
    return server.open()


def _moved(limits: Limits, threshold: float | None, review: float | None) -> Limits:
    try:
        return limits.moved(threshold, review)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


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


def main() -> None:
    """Run the command."""
    shared.run(app)
