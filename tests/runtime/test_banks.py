"""M3DM's banks on a CPU against the graph that engines run and against SciPy; what both read lies in one file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from m3ad.contract import Stage, Tensor
from m3ad.errors import ArtifactError
from m3ad.methods.m3dm import METHOD, UFF_METHOD
from m3ad_export.graphs.compose import write_banks, write_halves
from m3ad_export.graphs.trace import dense_model
from m3ad_export.heads.bank import Bank, TwoBanks
from m3ad_export.heads.three_banks import FusionBank, ThreeBanks
from m3ad_export.nets.uff import Uff
from m3ad_runtime.banks import Halves, NearestBanks
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
    return NearestBanks(paths[1:-1], paths[-1])


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


# Of three banks: 8 x 8 tokens of 12, 3136 cells of 20 of which 2000 are empty, and their halves.
TOKEN = np.arange(64).reshape(8, 8).repeat(7, 0).repeat(7, 1).reshape(-1)
CELLS = np.concatenate([RNG.normal(3, 1, (1136, 20)), np.zeros((2000, 20))]).astype(np.float32)
MORE = {
    "rgb_tokens": RNG.normal(3, 1, (64, 12)).astype(np.float32),
    "xyz_cells": CELLS,
    "rgb_half": RNG.normal(1, 1, (64, 12)).astype(np.float32),
    "xyz_half": np.where(CELLS.any(axis=1, keepdims=True), 2 * CELLS, np.float32(0.7)),
}
FUSED = RNG.normal(1, 1, (77, 32)).astype(np.float32)
UFF_FORM = UFF_METHOD.cpu["bank"]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("three")
    banks = ThreeBanks(
        *(Bank(torch.from_numpy(r)) for r in ROWS.values()), FusionBank(torch.from_numpy(FUSED), 20, 8)
    )
    banks.scale = torch.tensor(0.37)
    for bank in (banks.rgb, banks.xyz, banks.fusion):
        bank.find_neighbors()
    outputs = tuple(
        Tensor(f"{side}_distance", (3136 if side != "rgb" else 64,)) for side in ("xyz", "rgb", "fusion")
    )
    inputs = tuple(Tensor(name, array.shape) for name, array in MORE.items())
    stage = Stage("bank", inputs, (*outputs, Tensor("bank_scores", (3,))))
    onnx.save(dense_model(banks, stage), made / "bank.onnx")
    write_banks(made / "bank.onnx", UFF_FORM)
    return made


def test_three_banks_on_a_cpu_find_what_their_graph_and_brute_force_find(three: Path) -> None:
    paths = [three / name for name in UFF_FORM.files]
    found, expected = NearestBanks(paths[1:-1], paths[-1])(MORE), OnnxGraph(three / "bank.onnx", 1)(MORE)
    assert [*found] == ["xyz_distance", "rgb_distance", "fusion_distance", "bank_scores"]
    assert {*found} == {*expected}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5)
    fused = np.concatenate([MORE["xyz_half"], MORE["rgb_half"][TOKEN]], axis=1)
    asked = {"xyz": (CELLS, ROWS["xyz"]), "rgb": (MORE["rgb_tokens"], ROWS["rgb"]), "fusion": (fused, FUSED)}
    for k, (side, (queries, rows)) in enumerate(asked.items()):
        every = cdist(queries, rows) / 0.37
        np.testing.assert_allclose(found[f"{side}_distance"], every.min(axis=1), rtol=1e-5)
        worst = every.min(axis=1).argmax()
        nearest, largest = every[worst].argmin(), every[worst].min()
        near = np.argsort(cdist(rows[nearest : nearest + 1], rows)[0])[1:3]
        root = np.sqrt(rows.shape[1])
        weight = 1 - np.exp(largest / root) / np.exp(every[worst, near] / root).sum()
        assert found["bank_scores"][k] == pytest.approx(weight * largest, rel=1e-4)


def test_the_rows_of_a_fusion_bank_lie_in_two_files(three: Path) -> None:
    for half, width in (("xyz", 20), ("rgb", 12)):
        assert (three / f"bank_fusion_{half}.rows").stat().st_size == 77 * width * 4
    inside = onnx.load(three / "bank.onnx", load_external_data=False).graph.initializer
    rows = [i for i in inside if i.name.endswith("rows")]
    assert sorted(i.name for i in rows) == ["fusion.rgb_rows", "fusion.xyz_rows", "rgb.rows", "xyz.rows"]
    assert all(i.data_location == onnx.TensorProto.EXTERNAL for i in rows)
    assert max(len(i.raw_data) for i in inside) < 3136 * 8 + 1  # no copy: the tokens of cells are the largest


def test_empty_cells_are_fused_once(tmp_path: Path) -> None:
    """As the whole graph does, which engines run on every cell; the weights of all three graphs lie in one file."""
    torch.manual_seed(0)
    network = Uff(12, 20).eval()
    form, tokens, cells = (
        UFF_METHOD.cpu["uff"],
        Tensor("rgb_tokens", (64, 12)),
        Tensor("xyz_cells", (3136, 20)),
    )
    halves = Tensor("rgb_half", (64, 12)), Tensor("xyz_half", (3136, 20))
    some, made = Tensor("xyz_cells", ("K", 20)), Tensor("xyz_half", ("K", 20))
    onnx.save(
        dense_model(network.part("rgb"), Stage("uff_rgb", (tokens,), halves[:1])), tmp_path / "uff_rgb.onnx"
    )
    onnx.save(dense_model(network.part("xyz"), Stage("uff_xyz", (some,), (made,))), tmp_path / "uff_xyz.onnx")
    for _ in range(2):  # as a quantized bundle does with what it copied
        write_halves(Stage("uff", (tokens, cells), halves), form, tmp_path)
        assert (tmp_path / "uff.weights").stat().st_size < 1.1 * sum(
            p.nbytes for name, p in network.named_parameters() if "head" not in name
        )
    inputs = {name: MORE[name] for name in ("rgb_tokens", "xyz_cells")}
    with torch.inference_mode():
        expected = dict(
            zip(("rgb_half", "xyz_half"), network(*map(torch.from_numpy, inputs.values())), strict=True)
        )
    parts = [OnnxGraph(tmp_path / file, 1) for file in form.files[:2]]
    asked: list[int] = []

    def counted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked.append(len(arrays["xyz_cells"]))
        return parts[1](arrays)

    found = Halves(parts[0], counted)(inputs)  # type: ignore[arg-type]
    whole = OnnxGraph(tmp_path / "uff.onnx", 1)(inputs)
    assert asked == [1137]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
        np.testing.assert_allclose(whole[name], values, atol=1e-5)
