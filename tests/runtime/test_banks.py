"""M3DM's banks on a CPU against the graph that engines run and against SciPy; what both read lies in one file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from m3ad.contract import Stage, Tensor
from m3ad.errors import ArtifactError
from m3ad.methods.m3dm import METHOD
from m3ad_export.graphs.compose import write_banks
from m3ad_export.graphs.trace import dense_model
from m3ad_export.heads.bank import Bank, TwoBanks
from m3ad_runtime.banks import NearestBanks
from m3ad_runtime.onnx_graph import OnnxGraph
from scipy.spatial.distance import cdist

FORM = METHOD.cpu["bank"]
RNG = np.random.default_rng(0)
ROWS = {
    "rgb": RNG.normal(3, 1, (31, 12)).astype(np.float32),
    "xyz": RNG.normal(3, 1, (313, 20)).astype(np.float32),
}
QUERIES = {
    "rgb_tokens": RNG.normal(3, 1, (49, 12)).astype(np.float32),
    "xyz_cells": np.concatenate([RNG.normal(3, 1, (90, 20)), np.zeros((70, 20))]).astype(np.float32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("banks")
    banks = TwoBanks(*(Bank(torch.from_numpy(rows)) for rows in ROWS.values()))
    banks.scale = torch.tensor(0.37)
    for bank in (banks.rgb, banks.xyz):
        bank.find_neighbors()
    outputs = (Tensor("rgb_distance", (49,)), Tensor("xyz_distance", (160,)), Tensor("bank_scores", (2,)))
    inputs = tuple(Tensor(name, array.shape) for name, array in QUERIES.items())
    onnx.save(dense_model(banks, Stage("bank", inputs, outputs)), made / "bank.onnx")
    write_banks(made / "bank.onnx", FORM)
    return made


def on_a_cpu(folder: Path) -> NearestBanks:
    paths = [folder / name for name in FORM.files]
    return NearestBanks(paths[1:3], paths[3])


def test_a_cpu_finds_what_the_graph_finds(folder: Path) -> None:
    found, expected = on_a_cpu(folder)(QUERIES), OnnxGraph(folder / "bank.onnx", 1)(QUERIES)
    assert {*found} == {*expected}
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    for rows, queries, side in zip(ROWS.values(), QUERIES.values(), ROWS, strict=True):
        np.testing.assert_allclose(
            found[f"{side}_distance"], cdist(queries, rows).min(axis=1) / 0.37, rtol=1e-5
        )


def test_the_rows_lie_in_one_file_and_stay_there(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in FORM.files[:3]}
    for side, rows in ROWS.items():
        assert len(before[f"bank_{side}.rows"]) == rows.nbytes
        assert rows[5].tobytes() not in before["bank.onnx"]
    write_banks(folder / "bank.onnx", FORM)  # as a quantized bundle does with what it copied
    assert {name: (folder / name).read_bytes() for name in FORM.files[:3]} == before


@pytest.mark.parametrize("name", FORM.files[1:])
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    for kept in {*FORM.files} - {name}:
        (tmp_path / kept).write_bytes((folder / kept).read_bytes())
    with pytest.raises(
        ArtifactError, match=rf"{name} is missing; export the bundle again: m3ad-export bundle"
    ):
        on_a_cpu(tmp_path)
