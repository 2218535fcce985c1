"""The command as a user runs it: exit code, one JSON document on stdout, one sentence on stderr."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from m3ad.bundle import Bundle

COMMAND = str(Path(sys.executable).parent / "m3ad-triton")


def triton(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layout", ["chain", "fused"])
def test_write_then_check(tiny_bundle: Bundle, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "repository"
    done = triton("write", tiny_bundle.path, target, "--layout", layout, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["category"], told["layout"], told["runtime"]) == ("tiny", layout, "onnxruntime")
    done = triton("check", target, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"repository": str(target), "ok": True, "problems": []}


def test_check_lists_every_problem_and_fails(chain_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    shutil.copytree(chain_repository, path)
    (path / "tiny_mfm" / "1" / "mfm.onnx").write_bytes(b"")
    (path / "tiny_vm" / "1" / "model.py").unlink()
    done = triton("check", path, "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["problems"]) == 3
    assert done.stderr == f"error: {path} has 3 problems\n"
    assert len(triton("check", path).stdout.splitlines()) == 3
    assert "cannot be served: " in triton("serve", path).stderr


def test_refusals_are_one_sentence(tiny_bundle: Bundle, chain_repository: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        cases = {
            ("write", tmp_path, tmp_path / "r"): "has no manifest.json, so it is not a m3ad-bundle",
            ("write", tiny_bundle.path, tiny_bundle.path): "expected 'm3ad-repository'",
            (
                "write",
                tiny_bundle.path,
                tmp_path / "r",
                "--runtime",
                "tensorrt",
            ): "no TensorRT engines for Triton",
            ("check", tmp_path): "so it is not a m3ad-repository",
            ("docker", tmp_path): "so it is not a m3ad-repository",
            (
                "serve",
                chain_repository,
                "--http-port",
                port,
            ): f"http port {port} on 127.0.0.1 cannot be taken",
            ("serve", chain_repository, "--tritonserver", tmp_path): "is not a program",
        }
        for arguments, message in cases.items():
            done = triton(*arguments)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            last = done.stderr.splitlines()[-1]
            assert last.startswith("error: ")
            assert message in last
    assert not (tmp_path / "r").exists()


def test_docker_prints_one_line(chain_repository: Path) -> None:
    done = triton("docker", chain_repository)
    (line,) = done.stdout.splitlines()
    assert line.startswith("docker run --rm -p 127.0.0.1:8000-8002:8000-8002 --shm-size=")


BRACKETS = "line [cpu] [/] [red]:smile:"


def test_text_in_brackets_is_printed_whole(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / BRACKETS.replace("/", "") / "repo[v2]"
    done = triton("write", tiny_bundle.path, path)
    assert done.returncode == 0, done.stderr
    assert f"serve it: m3ad-triton serve {path}\n" in done.stderr
    assert f"{path}: ensemble tiny" in done.stdout
    assert triton("check", path).stderr == f"{path} can be served\n"
    (path / "tiny_head" / "1" / "x[y].bin").touch()
    done = triton("check", path)
    assert done.stderr == f"error: {path} has 1 problem\n"
    assert done.stdout.startswith(f"{path}/tiny_head/1/x[y].bin is not listed")
    usage = triton("serve", path, "--cert", tmp_path / BRACKETS)
    assert usage.returncode == 2
    assert f"'{tmp_path / BRACKETS}' does not exist" in usage.stderr


@pytest.mark.slow
def test_serve_prints_the_line_that_docker_prints(fused_repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "repo[v2]"
    shutil.copytree(fused_repository, path)
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [COMMAND, "serve", str(path), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            line = next(told for told in lines if told.startswith("official image: "))
        finally:
            process.terminate()
    assert line.removeprefix("official image: ") == triton("docker", path).stdout
    assert "[cpu]" in line
    assert f"{path}:/models/other:ro" in line


def test_docker_takes_folders_of_one_name_and_refuses_one_category_twice(
    chain_repository: Path, fused_repository: Path, tmp_path: Path
) -> None:
    for line, source in (("A", chain_repository), ("B", fused_repository), ("C", chain_repository)):
        shutil.copytree(source, tmp_path / line / "repository")
    a, b, c = (tmp_path / line / "repository" for line in "ABC")
    done = triton("docker", a, b)
    assert done.returncode == 0
    assert f"{a}:/models/tiny:ro" in done.stdout
    assert f"{b}:/models/other:ro" in done.stdout
    for command in ("docker", "serve"):
        done = triton(command, a, c)
        assert done.returncode == 1
        assert f"error: {a} and {c} both hold a model `tiny" in done.stderr


def test_http_plain_is_for_tls(chain_repository: Path) -> None:
    done = triton("serve", chain_repository, "--http-plain")
    assert done.returncode == 2
    assert "--ca and --http-plain need them" in done.stderr
    assert "Triton has TLS for gRPC alone" in " ".join(triton("serve", "--help").stdout.split())
