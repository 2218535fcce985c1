"""The head's tiles: every row once, whoever takes it, and an error in one of them is everyone's."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import make_input
from hypothesis import given
from hypothesis import strategies as st
from m3ad.bundle import Bundle
from m3ad_plugins import ops
from m3ad_runtime.onnx_graph import TILE_ROWS
from m3ad_runtime.stages import LEAST_TILE_ROWS, ROWS_IN_FLIGHT, TiledHead, cpu_form, tile_size
from onnx import helper


@given(count=st.integers(0, 5000), most=st.integers(1, 600), threads=st.integers(1, 9))
def test_tiles_are_of_one_size_and_as_many_for_each_thread(count: int, most: int, threads: int) -> None:
    size = tile_size(count, most, threads)
    tiles = -(-count // size)
    assert 1 <= size <= most
    fewest = -(-count // most)
    assert tiles <= -(-fewest // threads) * threads
    # Threads that take one after another: none has more than its share of the rows and a tile's rounding.
    assert -(-tiles // threads) * size < count / threads + size + 1
    assert (tiles - 1) * size < count or count == 0


def head_inputs(bundle: Bundle) -> dict[str, Any]:
    frame, generator = make_input(3000), np.random.default_rng(1)
    dims = bundle.dims
    idx = ops.farthest_point_sample(frame.points, dims.groups)
    tokens = {"rgb_tokens": (dims.rgb_tokens, dims.rgb_width), "xyz_tokens": (dims.groups, dims.xyz_width)}
    return {
        "points": frame.points,
        "point_pixel": frame.point_pixel,
        "scored_pixel": frame.scored_pixel,
        "centers": frame.points[idx],
        **{name: generator.normal(size=shape).astype(np.float32) for name, shape in tokens.items()},
    }


def head_of(bundle: Bundle, folder: Path, threads: int) -> TiledHead:
    head = cpu_form("head", folder, bundle.contract, threads)
    assert isinstance(head, TiledHead)
    return head


def head_files(bundle: Bundle, folder: Path, rows: int) -> Path:
    """The head's files with another number of rows in a tile."""
    for name in bundle.contract.method.cpu["head"].files:
        shutil.copyfile(bundle.file(f"onnx/{name}"), folder / name)
    model = onnx.load(folder / "head_rows.onnx")
    helper.set_model_props(model, {TILE_ROWS: str(rows)})
    onnx.save(model, folder / "head_rows.onnx")
    return folder


@pytest.mark.parametrize(("rows", "threads"), [(64, 1), (64, 2), (37, 5), (100_000, 3), (512, 40)])
def test_head_is_the_same_map_in_any_tiles_on_any_threads(
    tiny_bundle: Bundle, tmp_path: Path, rows: int, threads: int
) -> None:
    inputs = head_inputs(tiny_bundle)
    expected = head_of(tiny_bundle, tiny_bundle.path / "onnx", 1)(inputs)
    head = head_of(tiny_bundle, head_files(tiny_bundle, tmp_path, rows), threads)
    assert head.tile_rows * threads <= max(ROWS_IN_FLIGHT, LEAST_TILE_ROWS * threads)
    found = head(inputs)
    for name in ("anomaly_map", "score", "score_maps"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_an_error_in_one_tile_is_the_head_s(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ops.cosine_scores

    def fails_late(*arguments: Any) -> Any:
        if arguments[2] > 1000:
            raise MemoryError("cosine_scores: not enough memory or threads")
        return whole(*arguments)

    monkeypatch.setattr(ops, "cosine_scores", fails_late)
    head = head_of(tiny_bundle, head_files(tiny_bundle, tmp_path, 64), 2)
    with pytest.raises(MemoryError, match="cosine_scores: not enough memory"):
        head(head_inputs(tiny_bundle))
