"""m3ad-client whose clock on the wall jumps: soak_clock.py OFFSET_FILE ARGUMENTS..; SIGUSR1 reads the seconds again.

The clock of the machine belongs to others, so this process alone is lied to; SQLite and the files keep the true time.
"""

import signal
import sys
import time
from pathlib import Path

OFFSET_FILE = Path(sys.argv.pop(1))
TRUE_TIME = time.time
offset_s = [0.0]


def read(*_: object) -> None:
    """Take up the offset."""
    offset_s[0] = float(OFFSET_FILE.read_text())


read()
time.time = lambda: TRUE_TIME() + offset_s[0]
signal.signal(signal.SIGUSR1, read)

from m3ad_client.cli import main  # noqa: E402 - whoever imports `time.time` by name must get the false one

sys.exit(main())
