"""What the four commands share: how an error is shown and how a result is printed. It knows no command."""

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console

from m3ad.errors import M3adError

# Results go to stdout, talk and progress to stderr, so that `--json` leaves exactly one document on stdout.
talk = Console(stderr=True, highlight=False)


def run(app: Callable[[], Any]) -> NoReturn:
    """Run a Typer app: an M3adError becomes one line on stderr and exit code 1, a bug keeps its traceback."""
    try:
        app()
    except M3adError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    sys.exit(0)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity are bugs, JSON has no word for them."""
    typer.echo(json.dumps(document, allow_nan=False))


def print_text(text: str) -> None:
    """Print a result meant for people on stdout."""
    typer.echo(text)
