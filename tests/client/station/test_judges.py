"""What judges for a camera: engines of a bundle, only a signed bundle, a server behind TLS."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_double import GpuDouble
from gpu_engines import double_of, installed
from m3ad.bundle import Bundle
from m3ad.errors import ArtifactError, ServerError
from m3ad.signature import sign
from m3ad_client.station.config import Camera
from m3ad_client.station.judge import Judge
from m3ad_runtime.pipeline import Inspector
from m3ad_triton.endpoints import Tls as ServerTls
from m3ad_triton.server import LocalServer
from serving import make_frame


def judge(say: Callable[[str], None] = lambda _: None, **more: Any) -> Judge:
    return Judge(Camera(name="left", folder=Path("left"), **more), say)


def test_engines_judge_where_they_run_and_the_ledger_says_so(gpu_bundle: Bundle, double: GpuDouble) -> None:
    frame = make_frame(1)
    want = Inspector(gpu_bundle, "fused", threads=1).inspect(frame)
    for runtime in ("auto", None, "tensorrt"):
        opened = judge(bundle=gpu_bundle.path, runtime=runtime, threads=1)
        with opened.open() as inspector:
            found = inspector.inspect(frame)
        assert opened.record["runtime"].startswith("TensorRT ")
        assert found.score == pytest.approx(want.score, rel=1e-3)
        opened.close()
        assert opened.inspector is None
    on_cpu = judge(bundle=gpu_bundle.path, runtime="onnxruntime", threads=1)
    with on_cpu.open():
        assert on_cpu.record["runtime"].startswith("ONNX Runtime ")


def test_why_engines_are_not_used_is_said_or_refused(gpu_bundle: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    other = double_of("tensorrt")
    with installed(other, tmp_path / "library"):
        for engines in gpu_bundle.path.glob("engines/*"):
            assert engines.is_dir()
        bare = tmp_path / "bare"
        shutil.copytree(gpu_bundle.path, bare, ignore=shutil.ignore_patterns("engines"))
        with (
            pytest.raises(ArtifactError, match="build-engine"),
            judge(bundle=bare, runtime="tensorrt").open(),
        ):
            pass
        shutil.copytree(gpu_bundle.path / "engines" / "sm89", bare / "engines" / "sm89")
        opened = judge(said.append, bundle=bare, threads=1)
        with opened.open():
            assert opened.record["runtime"].startswith("ONNX Runtime ")
    assert len(said) == 1


def test_only_a_bundle_that_the_key_signed_is_taken(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    for name in ("line", "other"):
        key, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    signed = {"bundle": bundle, "threads": 1, "require_signature": tmp_path / "line.pub"}
    with pytest.raises(ArtifactError, match="is not signed"), judge(**signed).open():
        pass
    sign(bundle, tmp_path / "line.key")
    with judge(**signed).open() as inspector:
        assert inspector.record.category == "tiny"
    signed["require_signature"] = tmp_path / "other.pub"
    with pytest.raises(ArtifactError, match="not by that of"), judge(**signed).open():
        pass


@pytest.mark.slow
def test_a_server_behind_tls(fused_repository: Path, certificates: dict[str, Path]) -> None:
    ca, cert, key = (certificates[name] for name in ("ca", "cert", "key"))
    with LocalServer([fused_repository], tls=ServerTls(cert=cert, key=key, ca=ca)) as server:
        opened = judge(url=server.grpc_url, tls=True, ca=ca, cert=cert, key=key)
        with opened.open() as inspector:
            assert inspector.inspect(make_frame(1)).score > 0
        opened.close()
        plain = judge(url=server.grpc_url)
        with pytest.raises(ServerError, match="speaks TLS"), plain.open():
            pass
