"""The whole case table on the GPU of this machine: `python -m m3ad_plugins.gpu.case_table FOLDER`.

Compiles the kernels into FOLDER unless they are there, holds every row to its reference, times the full sizes, and
prints one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from m3ad.errors import M3adError

from m3ad_plugins.gpu.cases import FULL, OWN_ROWS, SMALL, Row, rows_on
from m3ad_plugins.gpu.kernels import Kernels, compile_kernels

WIDTH = 1152  # channels of the tokens in the timed rows
REPEATS = 50


def check_table(kernels: Kernels, *, few: bool = False) -> dict[str, float]:
    """Hold the rows to their references; `few` takes one small cloud, for a tool that slows kernels a hundred times.

    Returns:
        How many rows were held, and the milliseconds of a launch at full size.

    Raises:
        AssertionError: a row differs from its reference.
    """
    clouds = SMALL[1:2] if few else SMALL
    rows: list[Row] = [*OWN_ROWS]
    for case in clouds:
        for dtype in (np.float32, np.float16):
            rows += rows_on(case, 8, dtype)
        rows += rows_on(case, 5)
    for row in rows:
        kernels.check(row)
    for case in clouds:
        kernels.check_point_group(case)
    figures: dict[str, float] = {}
    held = len(rows) + len(clouds)
    for case in [] if few else FULL:
        count = len(case.points)
        for row in rows_on(case, WIDTH)[:3]:
            figures[f"{row.op} N={count} ms"] = round(kernels.check(row, REPEATS), 4)
        figures[f"point group N={count} ms"] = round(kernels.check_point_group(case, REPEATS), 4)
        held += 4
    return {"rows held": held, **figures}


def main() -> None:
    """Compile, check and print; what differs goes to stderr and ends with code 1."""
    parser = argparse.ArgumentParser(prog="python -m m3ad_plugins.gpu.case_table", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--few", action="store_true")
    chosen = parser.parse_args()
    library = chosen.folder / "libkernels.so"
    try:
        kernels = Kernels(library if library.is_file() else compile_kernels(chosen.folder))
        print(json.dumps(check_table(kernels, few=chosen.few)))  # noqa: T201
    except (M3adError, AssertionError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:400]}")


if __name__ == "__main__":
    main()
