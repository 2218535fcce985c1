"""Run frames through a station, a served line and a process while things break: soak_run.py [--frames N] [--seed S].

Prints a table for each and ends with 1 when a part was lost, judged twice or wrong, or memory grew by more than 5 %.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    sys.path.insert(0, str(folder))

import soak_parts  # noqa: E402
import soak_served  # noqa: E402
import soak_station  # noqa: E402

HALVES = ("station", "process", "served")


def main() -> int:
    """Run what was asked for; 1 when something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000, help="of each part")
    parser.add_argument("--every", type=int, default=100, help="frames between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="of each part; what is not fed by then is left out")
    parser.add_argument("--only", choices=HALVES)
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        bundle = soak_parts.small_bundle(Path(place) / "tiny")
        for half in (options.only,) if options.only else HALVES:
            folder, started = Path(place) / half, time.monotonic()
            folder.mkdir()
            pace = soak_parts.Pace(options.frames, options.every, options.minutes)
            if half == "station":
                result = soak_station.Soak(folder, bundle, options.seed).run(pace)
            elif half == "process":
                result = soak_served.in_process(bundle, pace, options.seed)
            else:
                result = soak_served.served(folder, bundle, pace, options.seed)
            result.row("took", f"{time.monotonic() - started:.0f} s (seed {options.seed})")
            print(result.table(), flush=True)
            wrong += len(result.wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
