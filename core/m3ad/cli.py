"""What the four commands share: how an error is shown and how a result is printed. It knows no command."""

import contextlib
import json
import signal
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console

from m3ad.atomic import NO_ROOM
from m3ad.errors import M3adError


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no colours of its own, and no broken lines."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


# Results go to stdout, talk and progress to stderr, so that `--json` leaves exactly one document on stdout.
talk = plain_console(stderr=True)


def say(line: str) -> None:
    """A line for whoever looks on while something runs for long; what runs goes on where its log has no room."""
    with contextlib.suppress(OSError):
        talk.print(line)


def run(app: typer.Typer) -> NoReturn:
    """Run a Typer app: an M3adError becomes one line on stderr and exit code 1, a bug keeps its traceback.

    So does a path that the system refuses: no place to write, no permission, no room. SIGTERM ends a command as Ctrl-C
    does, so that nothing is left half-written.

    Help and usage errors are printed plainly: rich would take [square brackets] in them for markup.
    """
    app.rich_markup_mode = None
    before = signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except M3adError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:  # not about a path that somebody gave
            raise
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {place}{error.strerror}; name another path, or make room there", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity are bugs, JSON has no word for them."""
    typer.echo(json.dumps(document, allow_nan=False))


def print_text(text: str) -> None:
    """Print a result meant for people on stdout."""
    typer.echo(text)
