"""Frames in, verdict out: the door for frames against the one for tensors and the pipeline in process, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from m3ad.bundle import Bundle
from m3ad.camera import read_camera
from m3ad.errors import ArtifactError, ServerError
from m3ad.frames import Frame
from m3ad.grid import to_frame
from m3ad.limits import Limits
from m3ad_client.triton import TritonInspector
from m3ad_runtime.pipeline import Inspection, Inspector
from m3ad_triton.backend import BLOCK, _serialized
from m3ad_triton.frame_models import moved
from m3ad_triton.repository import write_repository
from m3ad_triton.server import LocalServer
from m3ad_triton.verify import find_problems
from serving import make_frame, renamed
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

SIZES = [(224, 224), (480, 640), (1200, 1944)]
OUTPUTS = ("score", "is_anomalous", "verdict", "frame_map", "defects", "anomaly_map")


def frame_of(height: int, width: int, seed: int = 0) -> Frame:
    """The plate of `make_frame`, of any size."""
    small = make_frame(seed)
    rows, columns = np.arange(height) * 120 // height, np.arange(width) * 120 // width
    return Frame(small.rgb[rows][:, columns], small.xyz[rows][:, columns], f"{width}x{height}")


def ask(
    url: str,
    model: str,
    arrays: dict[str, np.ndarray],
    outputs: tuple[str, ...] = OUTPUTS,
    parameters: dict[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """What a client without m3ad gets."""
    inputs = []
    for name, array in arrays.items():
        entry = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array)
        inputs.append(entry)
    wanted = [grpcclient.InferRequestedOutput(name) for name in outputs]
    with grpcclient.InferenceServerClient(url) as client:
        found = client.infer(model, inputs, outputs=wanted, parameters=parameters, client_timeout=120)
        return {name: found.as_numpy(name) for name in outputs}


def assert_same(one: Inspection, other: Inspection) -> None:
    assert (one.score, one.verdict, one.is_anomalous) == (other.score, other.verdict, other.is_anomalous)
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    assert one.defects == other.defects


@pytest.mark.slow
@pytest.mark.parametrize(
    ("category", "layout", "size"),
    [("tiny", "chain", SIZES[0]), *(("other", "fused", size) for size in SIZES)],
)
def test_both_doors_and_the_process_say_the_same(
    server: LocalServer, tiny_bundle: Bundle, category: str, layout: str, size: tuple[int, int]
) -> None:
    frame = frame_of(*size)
    here = Inspector(tiny_bundle, layout)  # type: ignore[arg-type]
    want = here.inspect(frame)
    assert want.verdict == "defect"
    # Another limit, so that there are other defects to compare.
    high = float(np.percentile(want.anomaly_map, 99.5))
    with TritonInspector(server.grpc_url, category) as there:
        assert there.door(frame) == ("frames" if size == SIZES[0] else "tensors")
        assert there.doors == {"frames": category, "tensors": f"{category}_tensors"}
        assert_same(there.inspect_frame(frame), want)
        assert_same(there.inspect(frame, with_maps=True), want)
        here.limits = there.limits = Limits(high)
        want = here.inspect(frame)
        assert want.defects
        assert_same(there.inspect(frame), want)


@pytest.mark.slow
def test_what_any_client_gets(server: LocalServer, tiny_bundle: Bundle) -> None:
    frame = frame_of(200, 300)
    want = Inspector(tiny_bundle, "fused").inspect(frame)
    got = ask(server.grpc_url, "other", {"rgb": frame.rgb, "xyz": frame.xyz})
    assert got["score"].dtype == np.float32
    assert float(got["score"][0]) == want.score
    assert got["is_anomalous"].tolist() == [want.is_anomalous]
    assert got["verdict"].tolist() == [2 if want.is_anomalous else 0]
    np.testing.assert_array_equal(got["anomaly_map"], want.anomaly_map)
    np.testing.assert_array_equal(got["frame_map"], to_frame(want.anomaly_map, 200, 300))
    defects = json.loads(got["defects"][0])
    assert defects == json.loads(json.dumps([d.to_json() for d in want.defects or ()]))


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [("score",), ("is_anomalous", "defects"), ("frame_map",), ("verdict",)])
def test_a_client_asks_for_what_it_needs(server: LocalServer, outputs: tuple[str, ...]) -> None:
    frame = make_frame()
    got = ask(server.grpc_url, "other", {"rgb": frame.rgb, "xyz": frame.xyz}, outputs)
    assert got.keys() == {*outputs}


def bad_frames() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    good = make_frame()
    rgb, xyz = good.rgb, good.xyz
    return {
        "all background": (
            {"rgb": rgb, "xyz": np.zeros_like(xyz)},
            r"frame of this request is all background: every point is a hole",
        ),
        "not a number": (
            {"rgb": rgb, "xyz": np.full_like(xyz, np.nan)},
            "every xyz value is NaN or infinite, expected metres",
        ),
        "small": (
            {"rgb": rgb, "xyz": make_frame(3, part=0.1).xyz},
            "frame of this request has .* expected at least 1024; the part must fill",
        ),
        "millimetres": ({"rgb": rgb, "xyz": xyz * 1000}, "xyz must be in metres, so divide millimetres"),
        "holes with a number": (
            {"rgb": rgb, "xyz": np.where(np.isnan(xyz), np.float32(-9999), xyz)},
            "declare it with --hole -9999",
        ),
        "two sizes": (
            {"rgb": rgb, "xyz": xyz[:-1]},
            r"`xyz` has 119 rows of pixels but `rgb` 120, expected as many \(H\)",
        ),
        "nothing": (
            {"rgb": rgb[:0], "xyz": xyz[:0]},
            r"`rgb` is uint8 \[0, 120, 3\], expected uint8 \[H, W, 3\], H in 1\.\.4096, W in 1\.\.4096",
        ),
        "grey": ({"rgb": rgb[..., :1].copy(), "xyz": xyz}, r"Expected \[-1,-1,3\], got \[120,120,1\]"),
        "xyz of float64": (
            {"rgb": rgb, "xyz": xyz.astype(np.float64)},
            "'FP64', but model .* expects 'FP32'",
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("category", ["tiny", "other"])
def test_a_bad_frame_gets_its_sentence_and_the_next_is_served(server: LocalServer, category: str) -> None:
    frame = make_frame(1)
    for fault, (arrays, message) in bad_frames().items():
        with pytest.raises(InferenceServerException, match=message) as refused:
            ask(server.grpc_url, category, arrays)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT", fault
        assert "Traceback" not in str(refused.value)
        if category == "other" or fault == "grey":
            got = ask(server.grpc_url, category, {"rgb": frame.rgb, "xyz": frame.xyz}, ("score",))
            assert np.isfinite(got["score"])


@pytest.mark.slow
def test_a_request_moves_its_limits_and_no_other_s(server: LocalServer) -> None:
    frame = make_frame()
    arrays = {"rgb": frame.rgb, "xyz": frame.xyz}

    def said(**parameters: object) -> tuple[float, int, bool]:
        got = ask(server.grpc_url, "other", arrays, ("score", "verdict", "is_anomalous"), parameters)
        return float(got["score"][0]), int(got["verdict"][0]), bool(got["is_anomalous"][0])

    score, *usual = said()
    assert said(threshold=score + 1) == (score, 0, False)
    assert said(threshold=score + 1, review=score - 1) == (score, 1, False)
    assert said(threshold=str(score - 1)) == (score, 2, True)
    assert said() == (score, *usual)
    for parameters, message in (
        ({"threshold": "high"}, "parameter `threshold` is 'high', expected a number"),
        ({"threshold": 1.0, "review": 2.0}, "limit of review, 2, lies above that of reject, 1"),
        ({"review": "nan"}, "limits must be finite"),
    ):
        with pytest.raises(InferenceServerException, match=message) as refused:
            said(**parameters)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_limits_that_a_request_moves() -> None:
    limits = Limits(0.5, 0.3)
    assert moved(limits, {}) == limits
    assert moved(limits, {"threshold": 1, "other": "x"}) == Limits(1.0, 0.3)
    assert moved(limits, {"threshold": "0.2"}) == Limits(0.2, 0.2)
    assert moved(limits, {"review": 0.4}) == Limits(0.5, 0.4)
    with pytest.raises(ValueError, match="parameter `review` is True, expected a number"):
        moved(limits, {"review": True})


@pytest.mark.parametrize("length", [0, 2, 11, 12, 13, 1000])
def test_a_text_is_counted_alike_by_a_stub_for_either_numpy(length: int) -> None:
    """Old stubs read the item size of NumPy 2's types from where their flags lie."""
    assert BLOCK.flags == BLOCK.itemsize == 16
    text = b"x" * length
    sent = _serialized(np.array([text], np.object_)).tobytes()
    assert int.from_bytes(sent[:4], "little") == len(sent) - 4
    assert sent[4:].rstrip(b" ") == text
    assert len(sent) % 16 == 0


def test_a_repository_without_frames_has_one_door(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    written = write_repository(
        renamed(tiny_bundle, "plain", tmp_path), path, "onnxruntime", "fused", frames=False
    )
    assert not written.manifest.frames
    assert {p.name for p in path.iterdir() if p.is_dir()} == {
        "plain_tensors",
        "plain_tensor_gate",
        "plain_admit",
        "plain_rgb_extractor",
        "plain_xyz_extractor",
        "plain_head",
    }
    assert find_problems(path) == []


CAMERA = {
    "width": 200,
    "height": 160,
    "fx": 240.0,
    "fy": 250.0,
    "cx": 99.0,
    "cy": 80.5,
    "depth_scale": 0.0001,
}


def depth_of(height: int, width: int) -> np.ndarray:
    """A bumpy plate before nothing, in tenths of a millimetre, with holes."""
    y, x = np.mgrid[:height, :width]
    depth = 5000 + 20 * np.sin(x / 9) + y / 4
    depth[:20] = depth[-20:] = depth[:, :20] = depth[:, -20:] = 0
    depth[np.random.default_rng(0).random((height, width)) < 0.01] = 0
    return np.round(depth).astype(np.uint16)


@pytest.mark.slow
def test_a_depth_image_is_what_its_cloud_is(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "camera.json").write_text(json.dumps(CAMERA))
    camera = read_camera(tmp_path / "camera.json")
    cloud, whole, metres = (renamed(tiny_bundle, name, tmp_path) for name in ("cloud", "whole", "metres"))
    Bundle.open(metres).update(
        preprocessing=replace(tiny_bundle.preprocessing, camera=replace(camera, depth_scale=None)).to_json()
    )
    paths = [tmp_path / name / "repository" for name in ("cloud", "whole", "metres")]
    write_repository(cloud, paths[0], "onnxruntime", "fused")
    write_repository(whole, paths[1], "onnxruntime", "fused", depth="uint16", camera=camera)
    write_repository(metres, paths[2], "onnxruntime", "fused", depth="float32")
    assert [find_problems(path) for path in paths] == [[], [], []]
    depth = depth_of(160, 200)
    z = depth * 0.0001
    v, u = np.mgrid[:160, :200]
    xyz = np.stack([(u - 99.0) / 240.0 * z, (v - 80.5) / 250.0 * z, z], axis=-1).astype(np.float32)
    rgb = np.random.default_rng(1).integers(0, 256, (160, 200, 3)).astype(np.uint8)
    with LocalServer(paths) as server:
        want = ask(server.grpc_url, "cloud", {"rgb": rgb, "xyz": xyz}, parameters={"threshold": 0.2})
        for category, sent in (("whole", depth), ("metres", z.astype(np.float32))):
            got = ask(server.grpc_url, category, {"rgb": rgb, "depth": sent}, parameters={"threshold": 0.2})
            np.testing.assert_allclose(got["score"], want["score"], rtol=1e-4)
            np.testing.assert_allclose(got["frame_map"], want["frame_map"], atol=1e-4 * want["score"][0])
            assert got["verdict"] == want["verdict"] == 2
            ours, theirs = json.loads(got["defects"][0]), json.loads(want["defects"][0])
            assert theirs
            np.testing.assert_allclose(
                [d["centroid_m"] for d in ours], [d["centroid_m"] for d in theirs], atol=1e-3
            )
            with pytest.raises(
                InferenceServerException, match="the depth image is 200x159 pixels but its cam"
            ):
                ask(server.grpc_url, category, {"rgb": rgb[:-1], "depth": sent[:-1]})
        with TritonInspector(server.grpc_url, "whole") as inspector:
            assert inspector.doors == {"tensors": "whole_tensors"}
            found = inspector.inspect(Frame(rgb, xyz, "plate"))
            assert found.score == pytest.approx(float(want["score"][0]), rel=1e-4)


def test_depth_needs_a_camera(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"knows no camera, .*: m3ad-triton write --camera FILE"):
        write_repository(tiny_bundle.path, tmp_path / "repository", "onnxruntime", "fused", depth="uint16")


@pytest.mark.slow
def test_a_door_that_is_named_is_the_one_used(server: LocalServer, tiny_bundle: Bundle) -> None:
    """As where a repository was written without frames."""
    with TritonInspector(server.grpc_url, "other_tensors") as inspector:
        assert inspector.doors == {"tensors": "other_tensors"}
        assert_same(inspector.inspect(make_frame()), Inspector(tiny_bundle, "fused").inspect(make_frame()))
        assert inspector.door(make_frame()) == "tensors"
        inspector.doors = {"frames": "other"}
        with pytest.raises(ServerError, match="takes frames alone; leave --model out"):
            inspector.inspect(replace(make_frame(), name="x"), with_maps=True)
