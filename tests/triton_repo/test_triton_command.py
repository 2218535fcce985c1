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
            ("write", tmp_path, tmp_path / "r"): "has no manifest.json, so it is no m3ad-bundle",
            ("write", tiny_bundle.path, tiny_bundle.path): "expected 'm3ad-repository'",
            (
                "write",
                tiny_bundle.path,
                tmp_path / "r",
                "--runtime",
                "tensorrt",
            ): "no TensorRT engines for Triton",
            ("check", tmp_path): "so it is no m3ad-repository",
            ("docker", tmp_path): "so it is no m3ad-repository",
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
    assert line.startswith("docker run --rm -p 8000-8002:8000-8002 --shm-size=")
