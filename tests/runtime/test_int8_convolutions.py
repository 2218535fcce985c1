"""INT8 convolutions on the CPU against exact integers, from the sessions that the runtime opens."""

import numpy as np
import onnx
import pytest
from m3ad_runtime import onnx_graph
from m3ad_runtime.onnx_graph import AS_WRITTEN, RUN_AS_WRITTEN, OnnxGraph
from onnx import TensorProto, helper, numpy_helper

STEP, WEIGHT_STEP = np.float32(0.5), np.float32(0.25)
ZERO = np.int8(0)


@pytest.fixture(params=["as this CPU needs", "as a CPU whose sums saturate needs"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as this CPU needs":
        monkeypatch.setattr(onnx_graph, "sums_saturate", lambda: True)


def convolved(x: np.ndarray, w: np.ndarray, stride: int, pad: int, groups: int) -> np.ndarray:
    """x [1, C, H, W] and w [O, C / groups, k, k], int64: each output pixel a sum over the kernel's window."""
    padded = np.pad(x[0], ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    parts = zip(np.split(windows, groups), np.split(w, groups), strict=True)
    return np.concatenate([np.einsum("cyxij,ocij->oyx", part, kernel) for part, kernel in parts])[None]


def spread(x: np.ndarray, w: np.ndarray, stride: int) -> np.ndarray:
    """x [1, C, H, W] and w [C, O, k, k], int64: each input pixel adds its multiple of the kernel."""
    (_, rows, columns), (_, out, k, _) = x[0].shape, w.shape
    y = np.zeros((out, stride * (rows - 1) + k, stride * (columns - 1) + k), np.int64)
    for i in range(rows):
        for j in range(columns):
            y[:, i * stride : i * stride + k, j * stride : j * stride + k] += np.einsum(
                "c,coij->oij", x[0, :, i, j], w
            )
    return y[None]


def model_of(
    kind: str, w: np.ndarray, scales: np.ndarray, bias: np.ndarray, out_step: float = 0, **attributes: object
) -> bytes:
    """A convolution of two pairs; with `out_step` a pair behind it, what ONNX Runtime would run as integers."""
    axis, last = (0 if kind == "Conv" else 1), "rounded" if out_step else "y"
    constants = {"step": STEP, "zero": ZERO, "w": w.astype(np.int8), "s": scales, "b": bias}
    constants["out_step"] = np.float32(out_step)
    constants["z"] = np.zeros(scales.shape, np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"], axis=axis),
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dx"]),
        helper.make_node(kind, ["dx", "dw", "b"], ["y"], **attributes),
        helper.make_node("QuantizeLinear", ["y", "out_step", "zero"], ["qy"]),
        helper.make_node("DequantizeLinear", ["qy", "out_step", "zero"], ["rounded"]),
    ]
    nodes = nodes if out_step else nodes[:-2]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None, None]) for name in ("x", last)
    )
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "convolution", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {RUN_AS_WRITTEN: "1"})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def extreme(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Integers near both ends, alike along a channel, so that neighbours add up: what saturates 16 bits."""
    sign = np.where(rng.random((shape[0], shape[1], 1, 1)) < 0.5, 1, -1)
    return sign * rng.integers(100, 128, shape)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("kind", "channels", "out", "kernel", "stride", "groups"),
    [
        ("Conv", 70, 33, 1, 1, 1),
        ("Conv", 16, 24, 3, 1, 1),
        ("Conv", 64, 16, 3, 2, 1),
        ("Conv", 12, 12, 5, 1, 12),
        ("ConvTranspose", 40, 24, 2, 2, 1),
        ("ConvTranspose", 7, 5, 3, 1, 1),
    ],
)
def test_convolutions_are_those_of_integers(
    kind: str, channels: int, out: int, kernel: int, stride: int, groups: int
) -> None:
    rng = np.random.default_rng(channels + out + kernel)
    x = extreme(rng, (1, channels, 9, 11))
    shape = (out, channels // groups) if kind == "Conv" else (channels, out)
    w = extreme(rng, (*shape, kernel, kernel))
    scales = WEIGHT_STEP * (1 + np.arange(out, dtype=np.float32) % 3)
    bias = rng.normal(scale=1000, size=out).astype(np.float32)
    if kind == "Conv":
        exact = convolved(x, w, stride, kernel // 2, groups)
        attributes = {"strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": groups}
    else:
        exact, attributes = spread(x, w, stride), {"strides": [stride] * 2}
    wanted = exact * (STEP * scales.astype(np.float64))[:, None, None] + bias[:, None, None]
    feed, largest = {"x": (x * STEP).astype(np.float32)}, np.abs(wanted).max()
    (found,) = OnnxGraph(model_of(kind, w, scales, bias, **attributes), 2)(feed).values()
    assert np.abs(found - wanted).max() <= 1e-5 * largest
    out_step = largest / 120
    (rounded,) = OnnxGraph(model_of(kind, w, scales, bias, out_step, **attributes), 2)(feed).values()
    assert np.abs(rounded - wanted).max() <= 0.501 * out_step
    assert np.abs(exact).max() > 2**15  # a sum of 16 bits would not hold it


def test_what_lies_beyond_the_scale_is_clipped() -> None:
    """The rounding of the pair is there, in either form: 200 steps are 127, -200 are -128."""
    graph = OnnxGraph(
        model_of("Conv", np.ones((1, 1, 1, 1)), np.ones(1, np.float32), np.zeros(1, np.float32)), 1
    )
    x = STEP * np.array([200, -200, 3.4, 2.5], np.float32).reshape(1, 1, 2, 2)
    ((key, value),) = AS_WRITTEN.items()
    assert graph.session.get_session_options().get_session_config_entry(key) == value
    found = graph({"x": x})["y"].ravel() / STEP
    np.testing.assert_array_equal(found, [127, -128, 3, 2])
