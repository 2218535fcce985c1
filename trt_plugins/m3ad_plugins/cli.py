"""Command `m3ad-plugins`: build the TensorRT plugins on this machine, and test what it has of the ops."""

from pathlib import Path
from typing import Annotated

import typer
from m3ad.cli import print_text, run, talk
from m3ad.errors import M3adError

from m3ad_plugins.cuda_build import build_plugins
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


def main() -> None:
    """Entry point of `m3ad-plugins`."""
    run(app)
