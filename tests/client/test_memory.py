import os
import socket
import subprocess
import sys

import numpy as np
from m3ad_client.memory import PeakMemory, hardware, server_pid, tree_memory

HOLD_64_MB = "x = bytearray(2**26); x[::4096] = b'1' * len(x[::4096]); input()"


def test_tree_memory_counts_children() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD_64_MB], stdin=subprocess.PIPE) as child:
        with PeakMemory([child.pid, os.getpid()]) as peak:
            while peak.peaks[child.pid].pss_bytes < 2**26:
                assert child.poll() is None
        assert peak.peaks[os.getpid()].rss_bytes > peak.peaks[child.pid].rss_bytes >= 2**26
        child.communicate(b"\n")
    assert tree_memory(child.pid).rss_bytes == 0


def test_peak_outlives_the_memory() -> None:
    with PeakMemory([os.getpid()]) as peak:
        before = peak.peaks[os.getpid()].pss_bytes
        block = np.ones(2**24)  # 128 MiB
        while peak.peaks[os.getpid()].pss_bytes < before + 2**26:
            pass
        del block
    assert peak.peaks[os.getpid()].pss_bytes >= before + 2**26


def test_the_process_behind_a_local_port_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert server_pid(f"localhost:{port}") == os.getpid()
        assert server_pid(f"192.0.2.1:{port}") is None
    assert server_pid(f"localhost:{port}") is None
    assert server_pid("localhost") is None


def test_hardware_names_the_cores_this_process_may_use() -> None:
    assert hardware().endswith(f", {len(os.sched_getaffinity(0))} cores")
