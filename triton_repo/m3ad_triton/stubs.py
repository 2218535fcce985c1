"""The processes of a Triton's Python stages, found below /proc: who they are, whether they live, what they leave.

Triton never replaces a stage process that died, and goes on to call itself ready.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STUB = "triton_python_backend_stub"
REGION = "triton_python_backend_shm_region_"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Stub:
    """The process of a stage: its id, its model's name and its region of shared memory."""

    pid: int
    model: str
    region: str

    def is_alive(self, server: int) -> bool:
        """Whether the process still runs, as a child of the server."""
        return self._state(server) not in ("", "Z", "X")  # gone, zombie, dead

    def is_stopped(self, server: int) -> bool:
        """Whether somebody has stopped it, so that it answers nothing."""
        return self._state(server) in ("T", "t")

    def _state(self, server: int) -> str:
        found = _parent_and_state(self.pid)
        return found[1] if found is not None and found[0] == server else ""


def find_stubs(server: int) -> list[Stub]:
    """The stage processes of the tritonserver with this process id, in the order they were started."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    found = []
    for pid in pids:
        parent = _parent_and_state(pid)
        if parent is None or parent[0] != server:
            continue
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if Path(arguments[0]).name != STUB or len(arguments) < 3:
            continue
        # STUB .../MODEL/VERSION/model.py REGION ...
        found.append(Stub(pid, Path(arguments[1]).parent.parent.name, arguments[2]))
    return found


def hide_regions(stubs: Iterable[Stub]) -> None:
    """Let this user alone read the shared memory that frames pass through to the stages; Triton makes it 0644."""
    for stub in stubs:
        if stub.region.startswith(REGION) and "/" not in stub.region:
            with contextlib.suppress(FileNotFoundError):
                (SHARED_MEMORY / stub.region).chmod(0o600)


def remove_regions(stubs: Iterable[Stub]) -> None:
    """Remove the shared memory of stage processes that are gone; a Triton that is killed leaves it behind."""
    for stub in stubs:
        if stub.region.startswith(REGION) and "/" not in stub.region:
            (SHARED_MEMORY / stub.region).unlink(missing_ok=True)


def _parent_and_state(pid: int) -> tuple[int, str] | None:
    try:
        # the program's name, in parentheses, may hold blanks and parentheses itself
        state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return int(parent), state
