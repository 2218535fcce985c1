import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import make_input
from m3ad.bundle import Bundle
from m3ad.errors import FrameError, ServerError
from m3ad.pipeline import Inspector
from m3ad.preprocess import ModelInput
from m3ad_client.triton import Tls, TritonInspector
from m3ad_plugins import ops
from m3ad_triton.server import LocalServer
from m3ad_triton.server import Tls as ServerTls
from serving import make_frame

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "layout"), [("tiny", "chain"), ("other", "fused")])
def test_the_same_inspection_as_in_process(
    server: LocalServer, tiny_bundle: Bundle, model: str, layout: str
) -> None:
    here = Inspector(tiny_bundle, ops, layout)
    with TritonInspector(server.grpc_url, model) as there:
        assert there.record.score_maps == here.record.score_maps
        for seed in range(3):
            frame = make_frame(seed)
            got, want = (i.inspect(frame, with_maps=seed == 2) for i in (there, here))
            np.testing.assert_allclose(got.anomaly_map, want.anomaly_map, atol=1e-5)
            assert got.score == pytest.approx(want.score, abs=1e-5)
            assert got.is_anomalous == want.is_anomalous
            if seed == 2:
                np.testing.assert_allclose(got.score_maps, want.score_maps, atol=1e-5)
            else:
                assert got.score_maps is None


def test_a_refused_frame_is_a_frame_error_and_the_next_is_served(server: LocalServer) -> None:
    good = make_input(1200)
    with TritonInspector(server.grpc_url, "tiny") as inspector:
        with pytest.raises(FrameError, match=r"refused the request: .*`points` is float32 \[3, 3\]"):
            inspector.inspect_prepared(ModelInput(good.image, good.points[:3], good.point_pixel[:3]))
        assert inspector.inspect_prepared(good).score > 0


@pytest.mark.parametrize("model", ["tiny", "other"])
def test_tensors_of_wrong_values_are_refused_by_the_server(server: LocalServer, model: str) -> None:
    good = make_input(1200)
    descending, holed = good.point_pixel[::-1].copy(), good.points.copy()
    holed[7] = np.nan
    with TritonInspector(server.grpc_url, model) as inspector:
        with pytest.raises(
            FrameError, match=r"refused the request: .*`point_pixel` holds .* in ascending order"
        ):
            inspector.inspect_prepared(ModelInput(good.image, good.points, descending))
        with pytest.raises(FrameError, match=r"refused the request: .*`points` holds 3 values that are NaN"):
            inspector.inspect_prepared(ModelInput(good.image, holed, good.point_pixel))
        assert inspector.inspect_prepared(good).score > 0


def test_a_server_that_does_not_answer_in_time(server: LocalServer) -> None:
    with TritonInspector(server.grpc_url, "tiny") as inspector:
        inspector.timeout_s = 0.001
        with pytest.raises(ServerError, match=r"did not answer in 0\.001 s; wait longer: --timeout-s"):
            inspector.inspect_prepared(make_input(9000))


def test_a_server_that_goes_away(chain_repository: Path) -> None:
    with LocalServer([chain_repository]) as server:
        inspector = TritonInspector(server.grpc_url)  # one category: no name is needed
        assert inspector.model == "tiny"
    with pytest.raises(ServerError, match="no Triton answers at"):
        inspector.inspect_prepared(make_input(1024))
    inspector.close()


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """A certificate authority and a certificate of localhost signed by it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificates of this test and is not installed")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "ca_key", "cert", "key", "request", "names")}
    files["names"].write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    new_key = ["-newkey", "rsa:2048", "-nodes"]
    for arguments in (
        ["req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", files["ca_key"], "-out", files["ca"]],
        ["req", *new_key, "-subj", "/CN=localhost", "-keyout", files["key"], "-out", files["request"]],
        [
            *("x509", "-req", "-in", files["request"], "-extfile", files["names"], "-out", files["cert"]),
            *("-CA", files["ca"], "-CAkey", files["ca_key"], "-CAcreateserial"),
        ],
    ):
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
    return files


def test_tls_both_ways(fused_repository: Path, certificates: dict[str, Path]) -> None:
    ca, cert, key = (certificates[name] for name in ("ca", "cert", "key"))
    with LocalServer([fused_repository], tls=ServerTls(cert=cert, key=key, ca=ca)) as server:
        with TritonInspector(server.grpc_url, tls=Tls(ca=ca, cert=cert, key=key)) as inspector:
            assert inspector.inspect_prepared(make_input(1024)).score > 0
        with pytest.raises(ServerError, match="no Triton answers"):
            TritonInspector(server.grpc_url, timeout_s=5)
        with pytest.raises(ServerError, match="no Triton answers"):
            TritonInspector(server.grpc_url, tls=Tls(ca=ca), timeout_s=5)
