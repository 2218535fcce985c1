"""Entry points of the five commands: a package that a command needs and does not find is named, with its extra."""

import importlib
import sys
from typing import NoReturn

import typer

BUILD = "build-engine"  # the one command of `m3ad-export` for boxes that make no detectors


def client() -> NoReturn:
    """Run `m3ad-client`."""
    _start("m3ad_client.cli", "client")


def triton() -> NoReturn:
    """Run `m3ad-triton`."""
    _start("m3ad_triton.cli", "triton")


def export() -> NoReturn:
    """Run `m3ad-export`."""
    _start("m3ad_export.cli", "export")


def calibrate() -> NoReturn:
    """Run `m3ad-calibrate`."""
    _start("m3ad_calibrate.cli", "calibrate")


def plugins() -> NoReturn:
    """Run `m3ad-plugins`."""
    _start("m3ad_plugins.cli", "plugins")


def _start(module: str, extra: str) -> NoReturn:
    try:
        importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        ours = missing.startswith("m3ad") or missing in sys.stdlib_module_names
        if ours or not missing:  # a bug keeps its traceback
            raise
        if extra == "export" and BUILD in sys.argv:
            extra = "engine"
        typer.echo(
            f"error: {missing} is not installed, this command needs it: pip install 'm3ad[{extra}]'", err=True
        )
        sys.exit(1)
    sys.exit(0)
