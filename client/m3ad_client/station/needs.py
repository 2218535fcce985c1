"""The packages of the extras `station` and `opcua`, imported where they are used."""

import importlib
from typing import Any

from m3ad.errors import MissingDependencyError


def needed(module: str, extra: str = "station") -> Any:
    """A module of the extra.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingDependencyError(
            f"the station needs the package {error.name}; install it with: pip install 'm3ad[{extra}]'"
        ) from error
