"""Memory of servers, pages that processes share counted once (PSS): categories together against one by one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3ad.errors import ServerError

from m3ad_triton.binary import Binary
from m3ad_triton.server import LocalServer

ASK_S = 300.0


def compare(paths: Sequence[Path], binary: Binary | None = None) -> dict[str, Any]:
    """Bytes of one server of all repositories, of one of the first, and the sum of one server each, one at a time.

    Raises:
        ServerError: a server does not start, or its answer to the golden frame is not the bundle's.
    """
    alone = [measure([path], binary) for path in paths]
    return {
        "categories": len(paths),
        "together": measure(paths, binary),
        "first": alone[0],
        "one_each": sum(alone),
    }


def measure(paths: Sequence[Path], binary: Binary | None = None) -> int:
    """Bytes of a server that has answered the golden frame of each repository."""
    with LocalServer(paths, binary=binary) as server, server.line() as line:
        for category, served in server.models.categories.items():
            if problem := line.difference(served.golden, ASK_S):
                raise ServerError(f"category {category}: {problem}")
        return server_memory(server.pid)


def server_memory(pid: int) -> int:
    """Proportional bytes of a server and its stage processes, now."""
    group = [int(name) for name in os.listdir("/proc") if name.isdigit() and _session(int(name)) == pid]
    return sum(_pss(process) for process in group)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
