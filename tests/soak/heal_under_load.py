"""How a served line heals under load: python tests/soak/heal_under_load.py [--only STAGE ..]. Linux.

Ends with 1 where a fault was not noticed, took more than 15 s, or a client got a wrong answer after it was healed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    sys.path.insert(0, str(folder))

from load_and_faults import FAULTS, STAGES, Outcome, loaded  # noqa: E402
from soak_parts import small_bundle  # noqa: E402

MOST_S = 15.0


def is_good(outcome: Outcome) -> bool:
    """Whether it is as docs/reliability.md promises."""
    return outcome.noticed_s is not None and outcome.ready_s <= MOST_S and outcome.wrong_after == 0


def main() -> int:
    """Have each fault once; 1 when something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=(*STAGES, "server"), default=(*STAGES, "server"))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    options = parser.parse_args()
    bad = 0
    print("stage          fault    not ready   ready  all served  wrong  wrong after  refused  load")
    with (
        tempfile.TemporaryDirectory() as place,
        loaded(small_bundle(Path(place) / "tiny"), Path(place)) as load,
    ):
        for stage in options.only:
            for fault in options.faults:
                if stage == "server" and not fault.startswith("SIG"):
                    continue
                found = load.fault("" if stage == "server" else stage, fault)
                bad += not is_good(found)
                noticed = "never" if found.noticed_s is None else f"{found.noticed_s:.1f} s"
                print(
                    f"{stage:14} {fault:8} {noticed:>9} {found.ready_s:5.1f} s {found.served_s:9.1f} s {found.wrong:6}"
                    f" {found.wrong_after:12} {found.refused:8} {os.getloadavg()[0]:5.1f}",
                    flush=True,
                )
        print(f"{len(load.answers)} requests, of them right: {sum(a.right for a in load.answers)}")
        for told in sorted({a.refusal for a in load.answers if a.refusal}):
            print(f"refused: {told}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
