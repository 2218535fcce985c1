"""What a bench reports beside time: memory of process trees, the hardware, and whose port it is."""

import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}
SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process tree; `pss_bytes` counts shared pages once, `rss_bytes` once per process."""

    pss_bytes: int
    rss_bytes: int


def tree_memory(pid: int) -> Memory:
    """Memory of a process and all its children, now; a process that ends meanwhile counts as nothing."""
    pss = rss = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return Memory(0, 0)
    for process in processes:
        try:
            info = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        pss += getattr(info, "pss", info.rss)  # Linux alone knows the proportional share
        rss += info.rss
    return Memory(pss, rss)


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and all its children, read fast enough to do so between two frames."""
    try:
        root = psutil.Process(pid)
        return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


class PeakMemory:
    """The highest memory of process trees while its block runs, by sampling: `with PeakMemory([pid]) as peak`."""

    def __init__(self, pids: list[int]) -> None:
        self.peaks = {pid: tree_memory(pid) for pid in pids}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            for pid, peak in self.peaks.items():
                now = tree_memory(pid)
                self.peaks[pid] = Memory(
                    max(peak.pss_bytes, now.pss_bytes), max(peak.rss_bytes, now.rss_bytes)
                )


def server_pid(url: str) -> int | None:
    """The process that listens on a local HOST:PORT, or None when it is elsewhere or not ours to see."""
    host, _, port = url.rpartition(":")
    if host not in LOCAL_HOSTS or not port.isdigit():
        return None
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        listens = connection.status == psutil.CONN_LISTEN and connection.pid is not None
        if listens and connection.laddr and connection.laddr.port == int(port):
            return connection.pid
    return None


def hardware() -> str:
    """The processor of this machine and the cores this process may use, in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
    return f"{name}, {cores} cores"
