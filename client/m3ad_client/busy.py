"""Processes that each keep a core busy: the other work that a line's box may have while frames are measured."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COUNT_FOR_EVER = "while True: pass"


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Run `count` processes that do nothing but count until the block ends; their ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.extend(
            subprocess.Popen([sys.executable, "-S", "-c", COUNT_FOR_EVER]) for _ in range(count)
        )  # one by one: those that were started before one fails are ended too
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
