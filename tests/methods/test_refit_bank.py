"""M3DM's banks with the features of reviewed parts beside their own."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_input
from m3ad.bundle import Bundle
from m3ad.frames import Frame
from m3ad.preprocess import prepare
from m3ad_calibrate.refit_graphs import refit_bank
from m3ad_export.bundle_writer import write_bundle
from m3ad_runtime.pipeline import Inspector, Pipeline, model_arrays
from onnx import numpy_helper
from scipy.spatial.distance import cdist
from serving import make_frame
from tiny import make_detector


def rows_of(bundle: Bundle, side: str) -> np.ndarray:
    tensors = {t.name: t for t in onnx.load(bundle.path / "onnx" / "bank.onnx").graph.initializer}
    parts = [f"{side}.xyz_", f"{side}.rgb_"] if side == "fusion" else [f"{side}."]
    rows, mean = (
        np.concatenate([numpy_helper.to_array(tensors[f"{part}{name}"]) for part in parts], axis=-1)
        for name in ("rows", "mean")
    )
    found: np.ndarray = rows + mean
    return found


def features(bundle: Bundle, frame: Frame) -> dict[str, np.ndarray]:
    pipeline = Inspector(bundle, threads=1).pipeline
    assert isinstance(pipeline, Pipeline)
    prepared = prepare(frame, bundle.preprocessing)
    return pipeline.run(model_arrays(prepared), keep_all=True)[0]


def asked(side: str, values: dict[str, np.ndarray]) -> np.ndarray:
    if side != "fusion":
        return values[{"rgb": "rgb_tokens", "xyz": "xyz_cells"}[side]]
    token = np.arange(64).reshape(8, 8).repeat(7, 0).repeat(7, 1).reshape(-1)
    return np.concatenate([values["xyz_half"], values["rgb_half"][token]], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["m3dm", "m3dm_uff"])
def test_a_bank_learns_new_rows_and_keeps_its_size(method: str, tmp_path: Path) -> None:
    write_bundle(make_detector(method), make_input(2000), tmp_path / "m3dm", parity_points=(1024,))
    source = Bundle.open(tmp_path / "m3dm")
    shutil.copytree(source.path, tmp_path / "new")
    frames = [make_frame(seed) for seed in (1, 2)]
    new = refit_bank(Bundle.open(tmp_path / "new"), frames, source, seed=0)
    found = [features(source, frame) for frame in frames]
    after = features(new, frames[0])
    for side in source.manifest.score_maps:
        old, learned = rows_of(source, side), rows_of(new, side)
        assert learned.shape == old.shape
        candidates = np.concatenate([old, *(asked(side, values) for values in found)])
        nearest = cdist(learned, candidates)
        np.testing.assert_allclose(nearest.min(axis=1), 0, atol=1e-4)  # every row is one of both
        assert (nearest.argmin(axis=1) >= len(old)).any()
        if method == "m3dm_uff" and side == "xyz":
            np.testing.assert_allclose(learned[-1], old[-1], atol=1e-6)  # of the mean of all
        want = cdist(asked(side, found[0]), learned).min(axis=1)  # the tiny bank's scale is 1
        np.testing.assert_allclose(after[f"{side}_distance"], want, rtol=1e-3, atol=1e-3)
        assert after[f"{side}_distance"].mean() < found[0][f"{side}_distance"].mean()
    golden = np.load(new.file("golden/anomaly_map.npy"))
    assert not np.array_equal(golden, np.load(source.file("golden/anomaly_map.npy")))
