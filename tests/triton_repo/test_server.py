import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from conftest import make_input
from gpu_double import GpuDouble
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, MissingDependencyError, ServerError
from m3ad.frame_door import tensor_door
from m3ad_runtime.pipeline import Inspector, model_arrays
from m3ad_triton.binary import find_binary
from m3ad_triton.endpoints import Hosts, Ports, Tls, exposure
from m3ad_triton.repository import Repository
from m3ad_triton.server import LocalServer
from m3ad_triton.stubs import find_stubs
from serving import rehash
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def tree(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive)


def infer(server: LocalServer, model: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    inputs = []
    for name, array in arrays.items():
        entry = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        result = client.infer(
            tensor_door(model), inputs, client_timeout=120
        )  # a server that waits for ever is told
        return {name: result.as_numpy(name) for name in ("anomaly_map", "score", "score_maps")}


def test_ports_are_free_different_and_the_ones_asked_for() -> None:
    with taken_port() as port:
        free = port
    settled = Ports(grpc=free).settled(Hosts())
    assert settled.grpc == free
    assert len({settled.http, settled.grpc, settled.metrics, 0}) == 4


def test_a_port_in_use_is_one_sentence(chain_repository: Path) -> None:
    with (
        taken_port() as port,
        pytest.raises(ServerError, match=rf"grpc port {port} on 127\.0\.0\.1 cannot be taken.*--grpc-port"),
    ):
        LocalServer([chain_repository], ports=Ports(grpc=port)).start()


def test_a_binary_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="is not a program"):
        find_binary(tmp_path)


def test_a_tampered_repository_is_not_served(chain_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    shutil.copytree(chain_repository, path)
    (path / "tiny_vm" / "1" / "model.py").write_text("import os")
    with pytest.raises(ArtifactError, match=r"model\.py was changed after it was written"):
        LocalServer([path])


@pytest.mark.slow
@pytest.mark.parametrize(("category", "layout"), [("tiny", "chain"), ("other", "fused")])
@pytest.mark.parametrize("points", [1024, 1025, 9000])
def test_served_result_is_the_in_process_one(
    server: LocalServer, tiny_bundle: Bundle, category: str, layout: str, points: int
) -> None:
    prepared = make_input(points, seed=points)
    want = Inspector(tiny_bundle, layout).inspect_prepared(prepared, with_maps=True)
    got = infer(server, category, model_arrays(prepared))
    np.testing.assert_allclose(got["anomaly_map"], want.anomaly_map, atol=1e-5)
    np.testing.assert_allclose(got["score_maps"], want.score_maps, atol=1e-5)
    assert got["score"][0] == pytest.approx(want.score, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("category", "layout"), [("tiny", "chain"), ("other", "fused")])
def test_served_result_is_that_of_engines_in_process(
    server: LocalServer, gpu_bundle: Bundle, double: GpuDouble, category: str, layout: Layout
) -> None:
    with Inspector(gpu_bundle, layout, runtime="tensorrt") as inspector:
        for points in (1024, 17000, 50176):
            prepared = make_input(points, seed=points)
            want = inspector.inspect_prepared(prepared, with_maps=True)
            got = infer(server, category, model_arrays(prepared))
            np.testing.assert_allclose(got["anomaly_map"], want.anomaly_map, atol=1e-5)
            np.testing.assert_allclose(got["score_maps"], want.score_maps, atol=1e-5)
            assert got["score"][0] == pytest.approx(want.score, abs=1e-5)
    double.assert_given_back()


@pytest.mark.slow
def test_mfm_runs_twice_a_frame(server: LocalServer) -> None:
    def count(client: grpcclient.InferenceServerClient, model: str) -> int:
        return client.get_inference_statistics(model).model_stats[0].inference_stats.success.count

    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        before = {m: count(client, f"tiny_{m}") for m in ("mfm", "mgm")}
        infer(server, "tiny", model_arrays(make_input(1024)))
        assert count(client, "tiny_mfm") - before["mfm"] == 2
        assert count(client, "tiny_mgm") - before["mgm"] == 1


def bad_requests() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    good = model_arrays(make_input(2000))
    points, pixel = good["points"], good["point_pixel"]
    return {
        "wrong shape": ({**good, "image": good["image"][:, :, :100]}, "unexpected shape for input 'image'"),
        "wrong dtype": ({**good, "points": points.astype(np.float64)}, "'FP64', but model .* expects 'FP32'"),
        "missing input": ({k: v for k, v in good.items() if k != "points"}, "expected 4 inputs but got 3"),
        "few points": (
            {**good, "points": points[:10], "point_pixel": pixel[:10]},
            r"`points` is float32 \[10, 3\], expected float32 \[N, 3\], N in 1024\.\.50176",
        ),
        "all background": (
            {**good, "points": points[:0], "point_pixel": pixel[:0]},
            r"`points` is float32 \[0, 3\], expected",
        ),
        "not a number": (
            {**good, "points": np.full_like(points, np.nan)},
            "`points` holds 6000 values that are NaN or infinite, expected finite ones",
        ),
        "picture not a number": (
            {**good, "image": good["image"] * np.inf},
            "`image` holds .* NaN or infinite, expected finite",
        ),
        "lengths differ": (
            {**good, "point_pixel": pixel[:-1]},
            "has 1999 rows but .* 2000, expected as many|has 2000 rows but .* 1999, expected as many",
        ),
        "pixel twice": ({**good, "point_pixel": np.full_like(pixel, 7)}, "`point_pixel` holds 7 after 7"),
        "pixels descend": (
            {**good, "point_pixel": pixel[::-1].copy()},
            "expected each pixel once, in ascending",
        ),
        "pixel outside": (
            {**good, "point_pixel": pixel + 50000},
            r"`point_pixel` holds \d+\.\.\d+, expected pixels in 0\.\.50175",
        ),
        "scored pixel that is not reached": (
            {**good, "scored_pixel": np.arange(1000, dtype=np.int32)},
            "the foreground does not reach pixel 0, expected some of",
        ),
        "scored pixels descend": (
            {**good, "scored_pixel": good["scored_pixel"][::-1].copy()},
            "`scored_pixel` holds .* expected each pixel once, in ascending",
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("category", ["tiny", "other"])
@pytest.mark.parametrize("fault", bad_requests())
def test_a_bad_request_gets_a_sentence_and_the_next_frame_is_served(
    server: LocalServer, category: str, fault: str
) -> None:
    arrays, message = bad_requests()[fault]
    with pytest.raises(InferenceServerException, match=message) as refused:
        infer(server, category, arrays)
    assert "Traceback" not in str(refused.value)
    assert "model.py" not in str(refused.value)
    assert infer(server, category, model_arrays(make_input(1500)))["anomaly_map"].shape == (224, 224)


@pytest.mark.slow
def test_no_process_is_left_even_after_an_error(chain_repository: Path) -> None:
    processes: list[psutil.Process] = []

    def serve_and_fail() -> None:
        with LocalServer([chain_repository]) as server:
            processes.extend(tree(server.pid))
            raise KeyError("a bug in the block")

    with pytest.raises(KeyError, match="a bug"):
        serve_and_fail()
    assert len(processes) == 12  # the server, one stub per stage, and those around them
    assert gone(processes)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_told_with_the_log(chain_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    shutil.copytree(chain_repository, path)
    (path / "tiny_mfm" / "1" / "mfm.onnx").write_bytes(b"no graph")
    rehash(path)
    server = LocalServer([path])
    with pytest.raises(ServerError, match=r"did not start\. The end of its log:\n(.|\n)*tiny_mfm.*mfm\.onnx"):
        server.start()
    assert server.process is None
    assert not server.log_path.exists()


@pytest.mark.slow
def test_a_server_that_is_not_ready_in_time_is_stopped(chain_repository: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(ServerError, match=r"not ready after 0\.3 s; allow more: --ready-timeout-s"):
        LocalServer([chain_repository], ready_timeout_s=0.3).start()
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


@pytest.mark.slow
def test_a_path_that_no_shell_takes_is_served_and_nothing_is_written_into_it(
    fused_repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "Werk 3; Größe [v2] $HOME" / "repository"
    shutil.copytree(fused_repository, path)
    before = sorted(path.rglob("*"))
    with LocalServer([path]) as server:
        got = infer(server, "other", model_arrays(make_input(1024)))
        assert got["anomaly_map"].shape == (224, 224)
    assert sorted(path.rglob("*")) == before
    assert Repository.open(path).manifest.category == "other"


def serving_command(*arguments: object) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "m3ad-triton"), "serve", *map(str, arguments), "--json"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    return subprocess.Popen(
        [*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command and what it told once it was ready; it is stopped at the end whatever happened."""
    with serving_command(*arguments) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


@pytest.mark.slow
def test_what_is_open_to_others_is_told(fused_repository: Path) -> None:
    with served(fused_repository, "--host", "0.0.0.0") as (process, told):
        with grpcclient.InferenceServerClient(told["grpc_url"]) as client:
            assert client.is_model_ready("other")
            for ask in (
                lambda: client.register_system_shared_memory("x", "/x", 8),
                lambda: client.update_log_settings({"log_verbose_level": 1}),
                lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
            ):
                with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                    ask()
            with pytest.raises(InferenceServerException, match="not allowed"):
                client.load_model("other")
        url = f"{told['http_url']}/v2/systemsharedmemory/region/x/register"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(url, b"{}"))
        (folder,) = {
            word.split("=")[1]
            for word in psutil.Process(told["pid"]).cmdline()
            if word.startswith("--model-repository=")
        }
        assert stat.S_IMODE(os.stat(Path(folder).parent).st_mode) == 0o700
        regions = {stub.region for stub in find_stubs(told["pid"])}
        assert len(regions) == 8
        assert {stat.S_IMODE(os.stat(f"/dev/shm/{name}").st_mode) for name in regions} == {0o600}
        process.terminate()
        _, errors = process.communicate(timeout=30)
    (line,) = (line for line in errors.splitlines() if line.startswith("warning: "))
    assert line.startswith("warning: 0.0.0.0 lets other machines in without TLS: whoever reaches it can")


def test_what_is_open_where(fused_repository: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> tuple[Hosts, str]:
        server = LocalServer([fused_repository], **changes)
        return server.hosts, "\n".join(exposure(server.hosts, server.tls))

    tls = Tls(cert=tmp_path, key=tmp_path)
    plain = Tls(cert=tmp_path, key=tmp_path, http_plain=True)
    assert told() == (Hosts(), "")
    assert told(host="localhost")[1] == ""
    hosts, line = told(host="0.0.0.0", tls=tls)
    assert hosts == Hosts(grpc="0.0.0.0")
    assert line.startswith("TLS is gRPC's alone: HTTP answers health only, on 127.0.0.1 only")
    hosts, line = told(host="0.0.0.0", tls=plain, metrics_host="10.0.0.1")
    assert hosts == Hosts(grpc="0.0.0.0", http="0.0.0.0", metrics="10.0.0.1")
    assert line.startswith("warning: TLS is gRPC's alone, plain HTTP on 0.0.0.0 answers anybody")
    assert told(host="0.0.0.0")[0] == Hosts(grpc="0.0.0.0", http="0.0.0.0", metrics="0.0.0.0")


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(fused_repository: Path) -> None:
    with served(fused_repository) as (process, told):
        processes = tree(told["pid"])
        with grpcclient.InferenceServerClient(told["grpc_url"]) as client:
            assert client.is_model_ready("other")
        assert told["models"] == ["other"]
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert gone(processes)
