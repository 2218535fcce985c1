"""Clients that have no m3ad, as in `examples/`, on a real server: the score of `m3ad-client` to the last bit."""

import importlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as memory
from m3ad.bundle import Bundle
from m3ad.frames import Frame
from m3ad_runtime.pipeline import Inspection, Inspector
from m3ad_triton.server import LocalServer
from PIL import Image
from serving import make_frame

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = [(224, 224), (480, 640), (1200, 1944)]
LIMIT = "1000000"


class Files:
    """A frame of a size on disk, in the forms that the examples read, and what the process makes of it."""

    def __init__(self, folder: Path, inspector: Inspector, height: int, width: int) -> None:
        small = make_frame(height)
        rows, columns = np.arange(height) * 120 // height, np.arange(width) * 120 // width
        rgb = np.ascontiguousarray(small.rgb[rows][:, columns])
        # JSON has no word for NaN, so the holes are zeros here.
        xyz = np.ascontiguousarray(np.nan_to_num(small.xyz)[rows][:, columns])
        self.size, self.folder = (str(height), str(width)), folder / f"{width}x{height}"
        self.folder.mkdir()
        self.pair = [str(self.folder / "rgb.png"), str(self.folder / "xyz.tiff")]
        self.raw = [str(self.folder / "rgb.raw"), str(self.folder / "xyz.raw")]
        Image.fromarray(rgb).save(self.pair[0])
        tifffile.imwrite(self.pair[1], xyz, photometric="minisblack")
        for path, array in zip(self.raw, (rgb, xyz), strict=True):
            Path(path).write_bytes(array.tobytes())
        self.want: Inspection = inspector.inspect(Frame(rgb, xyz, "frame"))


@pytest.fixture(scope="module")
def frames(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    inspector, folder = Inspector(tiny_bundle, "fused"), tmp_path_factory.mktemp("frames")
    return [Files(folder, inspector, *size) for size in SIZES]


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    path = tmp_path_factory.mktemp("cpp") / "client"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(EXAMPLES / "client.cpp"), "-o", str(path)], check=True)
    return path


def run(*words: str, succeeds: bool = True) -> str:
    """What a client prints, or its sentence."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode == 0) is succeeds, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if succeeds else done.stderr + done.stdout


def host_port(url: str) -> str:
    return url.removeprefix("http://")


def python(name: str, *words: str, succeeds: bool = True) -> str:
    return run(sys.executable, str(EXAMPLES / name), *words, succeeds=succeeds)


def assert_same(document: dict[str, Any], want: Inspection, verdict: str | None = None) -> None:
    assert np.float32(document["score"]) == np.float32(want.score)
    assert document["verdict"] == (verdict or want.verdict)
    if verdict is None:
        assert document["defects"] == json.loads(json.dumps([d.to_json() for d in want.defects or ()]))
    else:
        assert document["defects"] == []


def from_json(answer: str) -> dict[str, Any]:
    """Triton's JSON as the other examples print it."""
    found = {output["name"]: output["data"][0] for output in json.loads(answer)["outputs"]}
    names = ("good", "review", "defect")
    return {**found, "verdict": names[found["verdict"]], "defects": json.loads(found["defects"])}


@pytest.mark.parametrize("name", ["grpc_client.py", "http_client.py"])
def test_plain_tritonclient(server: LocalServer, frames: list[Files], name: str) -> None:
    url = server.grpc_url if name == "grpc_client.py" else host_port(server.http_url)
    for frame in frames:
        assert_same(json.loads(python(name, url, "other", *frame.pair)), frame.want)
    moved = json.loads(python(name, url, "other", *frames[0].pair, LIMIT))
    assert_same(moved, frames[0].want, "good")
    told = python(name, url, "other", frames[0].pair[0], frames[1].pair[1], succeeds=False)
    assert "`xyz` has 480 rows of pixels but `rgb` 224" in told


def test_shared_memory(server: LocalServer, frames: list[Files]) -> None:
    before = set(os.listdir("/dev/shm"))
    for frame in frames:
        document = json.loads(python("shared_memory_client.py", server.grpc_url, "other", *frame.pair))
        assert_same(document, frame.want)
        assert document["largest"] == pytest.approx(float(frame.want.anomaly_map.max()), rel=0.05)
    told = python(
        "shared_memory_client.py",
        server.grpc_url,
        "other",
        frames[0].pair[0],
        frames[1].pair[1],
        succeeds=False,
    )
    assert "`xyz` has 480 rows" in told
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "example" in name}


def test_shared_memory_that_is_still_in_use(
    server: LocalServer, frames: list[Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While requests read a region the server keeps it; the example waits for them, and no longer than told."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example: Any = importlib.import_module("shared_memory_client")
    key, shape = f"held_{os.getpid()}", (*map(int, frames[2].size), 3)
    rgb, xyz = (np.fromfile(path, dtype) for path, dtype in zip(frames[2].raw, ("u1", "<f4"), strict=True))
    region = memory.create_shared_memory_region(key, f"/{key}", rgb.nbytes + xyz.nbytes)
    answers: queue.Queue[Any] = queue.Queue()
    try:
        memory.set_shared_memory_region(region, [rgb])
        memory.set_shared_memory_region(region, [xyz], offset=rgb.nbytes)
        inputs = [triton.InferInput("rgb", shape, "UINT8"), triton.InferInput("xyz", shape, "FP32")]
        inputs[0].set_shared_memory(key, rgb.nbytes)
        inputs[1].set_shared_memory(key, xyz.nbytes, offset=rgb.nbytes)
        with triton.InferenceServerClient(server.grpc_url) as client:
            client.register_system_shared_memory(key, f"/{key}", rgb.nbytes + xyz.nbytes)
            for _ in range(4):
                client.async_infer("other", inputs, lambda result, error: answers.put((result, error)))
            answered = [answers.get(timeout=120)]  # the others, which are as short, have arrived by now
            with pytest.raises(
                SystemExit, match=f"does not give back the shared memory {key}: .* currently in use"
            ):
                example.unregister(client, key, patience_s=0)
            example.unregister(client, key, patience_s=120)
            answered += [answers.get(timeout=120) for _ in range(3)]
    finally:
        memory.destroy_shared_memory_region(region)
    for result, error in answered:
        assert error is None
        assert result.as_numpy("score")[0] == frames[2].want.score


def test_shared_memory_without_a_server(frames: list[Files], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example: Any = importlib.import_module("shared_memory_client")
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{reserved.getsockname()[1]}"
        told = python("shared_memory_client.py", url, "other", *frames[0].pair, succeeds=False)
        with triton.InferenceServerClient(url) as client:
            example.unregister(client, "gone", patience_s=0)  # nothing is held: no second sentence
    assert told.startswith(f"no Triton answers at {url} (")
    assert len(told.splitlines()) == 1


def test_shared_memory_that_the_server_cannot_read(server: LocalServer, frames: list[Files]) -> None:
    """As on another machine: what the client makes is not where the server looks."""
    code = (
        "import runpy, sys, tritonclient.utils.shared_memory as memory\n"
        "create = memory.create_shared_memory_region\n"
        "memory.create_shared_memory_region = lambda name, key, size: create(name, key + '_elsewhere', size)\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"sys.argv = ['x', {server.grpc_url!r}, 'other', *{frames[0].pair!r}]\n"
        f"runpy.run_path({str(EXAMPLES / 'shared_memory_client.py')!r}, run_name='__main__')\n"
    )
    told = run(sys.executable, "-c", code, succeeds=False)
    assert "does not read this machine's shared memory" in told
    assert "send the frame in the request, as grpc_client.py does" in told


def test_curl(server: LocalServer, frames: list[Files]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    for script, some in (("curl_json.sh", frames[:1]), ("curl_binary.sh", frames)):
        command = [str(EXAMPLES / script), server.http_url, "other"]
        for frame in some:
            assert_same(from_json(run(*command, *frame.raw, *frame.size)), frame.want)
        moved = from_json(run(*command, *frames[0].raw, *frames[0].size, LIMIT))
        assert_same(moved, frames[0].want, "good")
        told = run(*command, *frames[0].raw, *frames[0].size, "high", succeeds=False)
        assert json.loads(told[told.index("{") :])["error"].endswith(
            "parameter `threshold` is 'high', expected a number"
        )


def test_json_is_for_small_frames(server: LocalServer, frames: list[Files]) -> None:
    told = run(
        str(EXAMPLES / "curl_json.sh"),
        server.http_url,
        "other",
        *frames[1].raw,
        *frames[1].size,
        succeeds=False,
    )
    assert told == (
        "a frame of 640 x 480 is too large for JSON, at most 65536 pixels are sent so; use curl_binary.sh\n"
    )


def test_cpp(server: LocalServer, frames: list[Files], cpp_client: Path) -> None:
    host, port = host_port(server.http_url).split(":")
    command = [str(cpp_client), host, port]
    for frame in frames:
        assert_same(json.loads(run(*command, "other", *frame.raw, *frame.size)), frame.want)
    moved = run(*command, "other", *frames[0].raw, *frames[0].size, LIMIT)
    assert_same(json.loads(moved), frames[0].want, "good")
    assert "HTTP 404: " in run(*command, "nobody", *frames[0].raw, *frames[0].size, succeeds=False)
    told = run(*command, "other", *frames[0].raw, *frames[1].size, succeeds=False)
    assert "rgb.raw holds 150528 bytes, expected 921600" in told
    assert "nothing answers at" in run(
        str(cpp_client), host, "1", "other", *frames[0].raw, *frames[0].size, succeeds=False
    )


def test_m3ad_client_says_the_same(server: LocalServer, frames: list[Files]) -> None:
    command = [str(Path(sys.executable).parent / "m3ad-client"), "infer"]
    where = ["--url", server.grpc_url, "--model", "other", "--json"]
    document = json.loads(run(*command, *frames[2].pair, *where))
    assert_same(document["frames"][0], frames[2].want)
    moved = json.loads(run(*command, *frames[0].pair, *where, "--threshold", LIMIT, "--review", "-1e6"))
    assert (moved["threshold"], moved["review"]) == (float(LIMIT), -1e6)
    assert moved["frames"][0]["verdict"] == "review"
    assert np.float32(moved["frames"][0]["score"]) == np.float32(frames[0].want.score)
