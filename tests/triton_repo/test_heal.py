"""A served line that heals: stages killed, stopped, hung and made wrong under a real server while clients ask."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from m3ad.bundle import Bundle
from m3ad.errors import ServerError
from m3ad.systemd import tell_systemd
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.heal import Watch, _fault
from m3ad_triton.health import Health
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from m3ad_triton.stubs import find_stubs
from serving import make_frame, rehash, renamed
from test_server import served, tree
from tritonclient.utils import InferenceServerException


def health(port: int) -> tuple[int, dict[str, Any]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_tells_what_is_wrong() -> None:
    wrong: list[str] = []
    endpoint = Health("127.0.0.1", 0, lambda: wrong[0] if wrong else None)
    try:
        assert health(endpoint.port) == (200, {"ok": True, "problem": None})
        wrong.append("stage `a` died")
        assert health(endpoint.port) == (503, {"ok": False, "problem": "stage `a` died"})
        with pytest.raises(
            ServerError, match=rf"health port {endpoint.port} on 127\.0\.0\.1 cannot be taken"
        ):
            Health("127.0.0.1", endpoint.port, lambda: None)
    finally:
        endpoint.close()


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        tell_systemd("READY=1")
        assert listener.recv(100) == b"READY=1"


class OneModel:
    """A line to a server that answers `each` further frames of others whenever it is looked at."""

    def __init__(self, each: int) -> None:
        self.each, self.count = each, 7

    def answered(self, model: str) -> int:
        assert model == "head"
        self.count += self.each
        return self.count


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ("Exceeds maximum queue size", "UNAVAILABLE"),
        ("Request timeout expired", "UNAVAILABLE"),
        ("Deadline Exceeded", "DEADLINE_EXCEEDED"),
    ],
)
@pytest.mark.parametrize("others", [0, 1])
def test_a_server_is_busy_only_while_it_answers_others(told: str, status: str, others: int) -> None:
    asked: list[float] = []

    def ask(seconds: float) -> str:
        asked.append(seconds)
        time.sleep(0.1)
        raise InferenceServerException(told, f"StatusCode.{status}")

    found = _fault(OneModel(others), ask, "head", 0.5, "a frame")  # type: ignore[arg-type]
    assert found == (None if others else "a frame is not answered in 0.5 s, nor is any other frame")
    assert not others or len(asked) == 1
    assert 0 < min(asked) <= max(asked) <= 0.5


@pytest.mark.slow
def test_a_line_heals_while_clients_ask(fused_repository: Path, tiny_bundle: Bundle) -> None:
    """Two clients ask all the time; a stage is killed, then another is stopped, then the server itself is killed."""
    want = Inspector(tiny_bundle, "fused").inspect(make_frame())
    found: list[object] = []
    done = threading.Event()

    def ask(url: str) -> None:
        with TritonInspector(url, "other", retries=10) as inspector:
            while not done.is_set():
                try:
                    found.append(inspector.inspect(make_frame()).score)
                except Exception as error:  # noqa: PERF203  whatever it is, the test must see it
                    found.append(error)

    regions: set[str] = set()  # of every server that was started here
    with served(fused_repository, "--health-port", "0") as (process, told):
        port = int(told["health_url"].partition(":")[2].rpartition(":")[2].partition("/")[0])
        threads = [threading.Thread(target=ask, args=(told["grpc_url"],)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for stage, sent in (
                ("other_head", signal.SIGKILL),
                ("other_judge", signal.SIGSTOP),
                ("", signal.SIGKILL),
            ):
                (server,) = psutil.Process(process.pid).children()
                regions |= {stub.region for stub in find_stubs(server.pid)}
                victims = [p for p in tree(server.pid) if not stage or f"/{stage}/" in " ".join(p.cmdline())]
                victims[0].send_signal(sent)
                statuses = wait_for_healing(port)
                assert 503 in statuses
                answered = len(found)
                wait_until(lambda n=answered: len(found) > n + 4)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        (server,) = psutil.Process(process.pid).children()
        regions |= {stub.region for stub in find_stubs(server.pid)}
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert {*found} == {want.score}
    lines = [line for line in errors.splitlines() if line.endswith("; starting the server again")]
    assert len(lines) == errors.count("served again, ") == 3
    assert re.match(  # whichever is sooner
        r"stage `other_head` \(process \d+\) died, killed|category other: .* process 'other_head_0_0' is not",
        lines[0],
    )
    assert re.match(
        r"stage `other_judge` \(process \d+\) was stopped|category other: `other_judge` is not", lines[1]
    )
    assert lines[2].startswith("tritonserver stopped by signal SIGKILL")
    assert len(regions) == 4 * 8
    assert not regions & {*os.listdir("/dev/shm")}


def wait_until(done: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_healing(port: int) -> list[int]:
    """Every status of /health until it is well again after it was not."""
    statuses: list[int] = []

    def again() -> bool:
        statuses.append(health(port)[0])
        return statuses[-1] == 200 and 503 in statuses

    wait_until(again)
    return statuses


@pytest.mark.slow
def test_what_answers_wrong_or_not_at_all_is_noticed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = renamed(tiny_bundle, "plate", tmp_path)
    write_repository(bundle, tmp_path / "line", "onnxruntime", "fused")
    said: list[str] = []
    with LocalServer([tmp_path / "line"]) as server:
        watch = Watch(server, said.append, timeout_s=3.0)
        watch.begin()
        assert watch.look() is None
        (category,) = server.models.categories.values()
        kept = category.golden.answer["score"].copy()
        category.golden.answer["score"] += 1  # as if the served networks had changed
        watch._due["plate"] = 0.0
        assert str(watch.look()).startswith("category plate: `score` differs from the bundle's by 1")
        with pytest.raises(
            ServerError, match="the server was started 3 times and is not well: category plate: `sco"
        ):
            watch._heal("a test")
        category.golden.answer["score"][:] = kept
        # A server that hangs: nothing is dead, and nothing is answered.
        os.kill(server.pid, signal.SIGSTOP)
        watch._due["plate"] = 0.0
        problem = str(watch.look())
        assert "category plate: its golden frame is not answered" in problem
        watch._heal(problem)
        assert watch.look() is None
    assert said[-1].startswith("served again, ")


HANGING_GATE = """
import time
from pathlib import Path

from m3ad_triton.gate import TritonPythonModel as Gate


class TritonPythonModel(Gate):
    def execute(self, requests):
        while Path({hold!r}).exists():
            time.sleep(0.01)
        return super().execute(requests)
"""


@pytest.mark.slow
def test_a_gate_that_hangs_is_noticed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Golden frames do not pass it, nor do those that `prepare` is asked for."""
    bundle, hold = renamed(tiny_bundle, "plate", tmp_path), tmp_path / "hold"
    write_repository(bundle, tmp_path / "line", "onnxruntime", "fused")
    (tmp_path / "line" / "plate_gate" / "1" / "model.py").write_text(HANGING_GATE.format(hold=str(hold)))
    rehash(tmp_path / "line")
    with LocalServer([tmp_path / "line"]) as server:
        watch = Watch(server, lambda _: None, timeout_s=3.0)
        watch.begin()
        hold.touch()
        watch._due["plate"] = 0.0
        found = str(watch.look())
        hold.unlink()
    assert found == "category plate: `plate_gate` is not answered in 3 s, nor is any other frame"


@pytest.mark.slow
def test_the_probe_of_a_health_check(server: LocalServer, fused_repository: Path, tmp_path: Path) -> None:
    def probe(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "m3ad-triton"), "probe", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    good = probe(fused_repository, "--url", server.grpc_url, "--json")
    assert good.returncode == 0, good.stderr
    assert [*json.loads(good.stdout)["ms"]] == ["other_tensors"]
    wrong = tmp_path / "wrong"
    shutil.copytree(fused_repository, wrong)
    path = wrong / "other_tensors" / "golden" / "anomaly_map.npy"
    kept = np.load(path)
    np.save(path, kept * 2)
    rehash(wrong)
    bad = probe(wrong, "--url", server.grpc_url)
    assert bad.returncode == 1
    assert "does not answer its golden frame as the bundle does: " in bad.stderr
    assert "`anomaly_map` differs from the bundle's by" in bad.stderr
    np.save(path, kept)
    config = wrong / "other_prepare" / "config.pbtxt"
    config.write_text(config.read_text().replace('\\"plane\\": \\"none\\"', '\\"plane\\": \\"ransac\\"'))
    rehash(wrong)
    other = probe(wrong, "--url", server.grpc_url)  # as if the server prepared by other settings
    assert other.returncode == 1
    assert "`other_prepare`: `points` is not what m3ad makes of the same frame" in other.stderr
    nobody = probe(fused_repository, "--url", "localhost:1")
    assert nobody.returncode == 1
    assert "error: other_tensors at localhost:1 gives no answer (" in nobody.stderr
    assert f"start it: m3ad-triton serve {fused_repository}" in nobody.stderr
