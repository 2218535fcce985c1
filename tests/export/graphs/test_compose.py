"""What is written in ONNX by hand computes what the PyTorch module of the same name does."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.contract import MAX_POINTS
from m3ad_export.detector import call
from m3ad_export.graphs.compose import OPSET, rgb_rows
from m3ad_export.heads.rgb_rows import RgbRows
from onnx import helper


def run_rows(side: int, tokens: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    graph = rgb_rows(side, "rgb_tokens", "scored_pixel", "rgb_features")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"rgb_tokens": tokens, "scored_pixel": pixel})
    return rows


@pytest.mark.parametrize("side", [1, 8, 16, 28])
def test_rgb_rows_are_the_module_s_to_the_last_bit(side: int) -> None:
    tokens = np.random.default_rng(side).normal(size=(side * side, 7)).astype(np.float32)
    pixel = np.arange(MAX_POINTS, dtype=np.int32)
    (expected,) = call(RgbRows(side), tokens, pixel)
    np.testing.assert_array_equal(run_rows(side, tokens, pixel), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 28), st.lists(st.integers(0, MAX_POINTS - 1), min_size=1, max_size=40))
def test_rgb_rows_of_any_pixels(side: int, pixels: list[int]) -> None:
    tokens = np.random.default_rng(side).normal(size=(side * side, 3)).astype(np.float32)
    pixel = np.array(pixels, np.int32)
    (expected,) = call(RgbRows(side), tokens, pixel)
    np.testing.assert_array_equal(run_rows(side, tokens, pixel), expected)


def test_names_of_its_own_stand_apart() -> None:
    graph = rgb_rows(8, "rgb_projected", "tile_pixel", "rgb_rows")
    read = {name for node in graph.node for name in node.input} - {"rgb_projected", "tile_pixel"}
    made = {name for node in graph.node for name in node.output} - {"rgb_rows"}
    assert all(name.startswith("rgb_rows.") for name in (*read, *made, *(n.name for n in graph.node)))
    assert len({n.name for n in graph.node}) == len(graph.node)
