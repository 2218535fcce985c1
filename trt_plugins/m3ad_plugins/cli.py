"""Command `m3ad-plugins`: build the TensorRT plugins on this machine, and test what it has of the ops."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from m3ad.cli import print_text, run, talk
from m3ad.errors import M3adError

from m3ad_plugins.cuda_build import build_plugins
from m3ad_plugins.gpu.plan import gpu_steps
from m3ad_plugins.gpu.report import document, gpu_of_this_machine, write_report
from m3ad_plugins.gpu.steps import Result, run_steps
from m3ad_plugins.self_test import check_ops

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def build(
    tensorrt: Annotated[
        Path | None,
        typer.Option(
            help="folder whose include/ has NvInferRuntime.h; the system's if left out", exists=True
        ),
    ] = None,
    cuda: Annotated[
        Path | None,
        typer.Option(help="CUDA toolkit, as in /usr/local/cuda; that of nvcc if left out", exists=True),
    ] = None,
    architectures: Annotated[
        str | None, typer.Option(help="SMs to compile for, as in '87' or '86;89'; all there are if left out")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the libraries; one where m3ad looks for them if left out")
    ] = None,
) -> None:
    """Compile kernels and plugins with nvcc and TensorRT's headers; no TensorRT library is needed."""
    talk.print("compiling, a minute or two for all architectures")
    print_text(str(build_plugins(tensorrt, cuda, architectures, out)))


@app.command()
def test() -> None:
    """Hold the C++ ops to their references and ask every TensorRT here for the plugins; exit code 1 on a failure."""
    results = check_ops()
    for result in results:
        print_text(f"{'ok  ' if result.is_well else 'FAIL'} {result}")
    failed = sum(not result.is_well for result in results)
    if failed:
        raise M3adError(
            f"{failed} of {len(results)} checks failed; m3ad-export doctor says what this machine lacks"
        )


@app.command()
def gpu(
    out: Annotated[
        Path, typer.Option(help="JSON document to write; the Markdown rows go beside it, to .md")
    ] = Path("m3ad-gpu.json"),
    tensorrt: Annotated[
        Path | None,
        typer.Option(
            help="folder whose include/ has NvInferRuntime.h; the system's if left out", exists=True
        ),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(help="trained detector for the whole frame; random weights if left out", exists=True),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="bundle that full TensorRT builds engines of; none if left out", exists=True),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="a category's folder: frames for those engines", exists=True)
    ] = None,
    minutes: Annotated[float, typer.Option(help="all of it may take", min=1)] = 20,
) -> None:
    """Prove and measure on this machine's GPU what no test without one can; needs no network.

    Case table, the plugins' enqueue, a whole frame in PyTorch with the kernels, compute-sanitizer, engines: a step that
    lacks something on this machine says what. Exit code 1 if a step failed or none could run.
    """
    device = gpu_of_this_machine()

    def tell(result: Result, so_far: Sequence[Result]) -> None:
        figures = ", ".join(f"{name} {value}" for name, value in result.figures.items())
        talk.print(f"{result.name}: {result.state}; {result.said or figures}")
        write_report(out, document(device, so_far))

    with tempfile.TemporaryDirectory(prefix="m3ad-gpu-") as work:
        results = run_steps(
            gpu_steps(device, Path(work), tensorrt, detector, bundle, data), minutes * 60, tell
        )
    print_text(f"{out} and {out.with_suffix('.md')}")
    went_wrong = [result.name for result in results if result.state in ("failed", "out of time")]
    if went_wrong:
        raise M3adError(f"{', '.join(went_wrong)} did not pass; {out} says why")
    if not any(result.state == "passed" for result in results):
        raise M3adError("nothing was measured: no step could run on this machine")


def main() -> None:
    """Entry point of `m3ad-plugins`."""
    run(app)
