"""Prepared tensors are held to the contract's values as well as to its shapes, at both doors: pipeline and stages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import make_input
from hypothesis import given
from hypothesis import strategies as st
from m3ad.bundle import Bundle
from m3ad.contract import MAX_POINTS, Tensor, mismatch
from m3ad.errors import FrameError
from m3ad.preprocess import ModelInput
from m3ad_runtime.pipeline import Inspector, model_arrays
from m3ad_runtime.stages import CheckedStage

POINTS = 1300


def swapped(pixels: np.ndarray) -> np.ndarray:
    pixels[[600, 601]] = pixels[[601, 600]]
    return pixels


def with_value(at: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


WRONG: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
    ("point_pixel", lambda p: p[::-1].copy(), "expected each pixel once, in ascending order"),
    ("point_pixel", lambda p: np.random.default_rng(0).permutation(p), "in ascending order"),
    ("point_pixel", swapped, r"`point_pixel` holds \d+ after \d+, expected each pixel once"),
    ("point_pixel", lambda p: p[[0, *range(len(p) - 1)]], "expected each pixel once"),
    ("point_pixel", with_value(-1, MAX_POINTS), r"holds \d+\.\.50176, expected pixels in 0\.\.50175"),
    ("point_pixel", with_value(0, -1), r"holds -1\.\.\d+, expected pixels in 0\.\.50175"),
    (
        "point_pixel",
        lambda p: p[:-1],
        rf"has {POINTS - 1} rows but `points` {POINTS}, expected as many \(N\)",
    ),
    ("points", with_value((5, 1), np.nan), "`points` holds 1 values that are NaN or infinite"),
    ("points", with_value(5, np.inf), "`points` holds 3 values that are NaN or infinite"),
    ("image", with_value((0, 1, 2, 3), -np.inf), "`image` holds 1 values that are NaN or infinite"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_wrong_values_are_refused_at_both_doors(
    tiny_bundle: Bundle, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    arrays: dict[str, Any] = {n: a.copy() for n, a in model_arrays(make_input(POINTS)).items()}
    arrays[name] = change(arrays[name])
    with pytest.raises(FrameError, match=rf"{message}.*; prepare frames with m3ad.preprocess.prepare"):
        Inspector(tiny_bundle).inspect_prepared(ModelInput(**arrays))
    rng = np.random.default_rng(0)
    for stage in tiny_bundle.contract.stages.values():
        if name not in {t.name for t in stage.inputs} or name == "image":  # its tokens are looked at instead
            continue
        given_: dict[str, Any] = {
            t.name: arrays.get(
                t.name, rng.normal(size=t.shape if -1 not in t.shape else 3).astype(np.float32)
            )
            for t in stage.inputs
        }
        checked = CheckedStage(stage, lambda _: pytest.fail("a stage ran on wrong values"))
        with pytest.raises(ValueError, match=rf"stage {stage.name}: .*{message.split('`')[-1]}"):
            checked(given_)


@given(
    pixels=st.lists(
        st.one_of(st.integers(-2, 6), st.integers(MAX_POINTS - 3, MAX_POINTS + 1)), min_size=1, max_size=6
    )
)
def test_pixels_are_those_of_a_sorted_set(pixels: list[int]) -> None:
    tensor = Tensor("scored_pixel", ("R",), "int32", values="pixels")
    fits = pixels == sorted(set(pixels)) and pixels[0] >= 0 and pixels[-1] < 224 * 224
    assert (tensor.mismatch(np.array(pixels, np.int32)) is None) is fits


def test_every_stage_that_takes_them_knows_the_rule(tiny_bundle: Bundle) -> None:
    rules = {t.name: t.values for s in tiny_bundle.contract.stages.values() for t in (*s.inputs, *s.outputs)}
    assert {n for n, v in rules.items() if v != "any"} == {
        "rgb_tokens",
        "points",
        "point_pixel",
        "scored_pixel",
    }
    assert {t.name for t in tiny_bundle.contract.inputs if t.values == "finite"} == {"image", "points"}
    assert mismatch((Tensor("image", (1,)),), {}) == "`image` is needed, it was not given"
