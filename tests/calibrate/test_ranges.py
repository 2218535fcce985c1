import numpy as np
import pytest
from m3ad_calibrate.ranges import LARGEST, Observed, limit, observe, rounded
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector


def seen(values: np.ndarray) -> Observed:
    magnitudes = np.abs(values).ravel()
    return Observed(float(magnitudes.max()), magnitudes, magnitudes)


@pytest.fixture
def heavy_tailed() -> np.ndarray:
    """Mostly a normal distribution, and three values thirty times as large."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(size=200_000), [30.0, -31.0, 32.0]]).astype(np.float32)


def test_max_takes_the_outlier_and_percentile_does_not(heavy_tailed: np.ndarray) -> None:
    found = seen(heavy_tailed)
    assert limit(found, "max", "int8") == 32
    assert limit(found, "percentile", "int8") == pytest.approx(np.percentile(np.abs(heavy_tailed), 99.99))
    assert limit(found, "percentile", "int8") < 5


def test_mse_is_the_best_of_a_fine_scan(heavy_tailed: np.ndarray) -> None:
    found = limit(seen(heavy_tailed), "mse", "int8")

    def error(c: float) -> float:
        scale = c / 127
        return float(
            np.square(np.clip(np.round(heavy_tailed / scale), -127, 127) * scale - heavy_tailed).mean()
        )

    assert error(found) <= 1.02 * min(error(c) for c in np.linspace(1, 32, 300))
    assert error(found) < 0.9 * error(32)


def test_entropy_agrees_with_onnx_runtime(heavy_tailed: np.ndarray) -> None:
    collector = HistogramCollector(
        "entropy", symmetric=True, num_bins=4095, num_quantized_bins=255, percentile=0, scenario="same"
    )
    counts, edges = np.histogram(heavy_tailed, bins=4095, range=(-32, 32))
    _, theirs, *_ = collector.get_entropy_threshold((counts, edges, -32, 32, 32), 255)
    ours = limit(seen(heavy_tailed), "entropy", "int8")
    assert ours == pytest.approx(abs(float(theirs)), rel=0.35)
    assert ours < 10  # the three outliers are clipped


def test_fp8_rounds_as_its_own_type() -> None:
    import ml_dtypes

    values = np.random.default_rng(1).normal(size=4000).astype(np.float32)
    scale = np.float32(2.0 / 448)
    expected = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(rounded(values, 2.0, "fp8"), expected)
    assert np.abs(rounded(values, 2.0, "int8")).max() == pytest.approx(2.0)
    assert {"int8": 127, "fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)} == LARGEST


def test_a_tensor_of_zeros_has_a_limit() -> None:
    assert limit(seen(np.zeros(10, np.float32)), "mse", "int8") == 1


def test_observe_sees_inputs_and_inner_values_of_every_run() -> None:
    weight = np.array([[2.0, 0.0], [0.0, -5.0]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["R", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    runs = [{"x": np.array([[1.0, 1.0]], np.float32)}, {"x": np.array([[-3.0, 0.5], [0, 0]], np.float32)}]
    found = observe(model, runs, ["x", "h"])
    assert (found["x"].largest, found["h"].largest) == (3, 6)
    np.testing.assert_array_equal(found["h"].channel_largest, [6, 5])
    assert sorted(found["h"].magnitudes) == [0, 0, 2, 2.5, 5, 6]
