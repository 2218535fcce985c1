"""Where each activation is clipped: values observed on recorded inputs, and the four ways to choose a limit from them.

Symmetric and per tensor: a limit is one positive number, and nothing here knows a graph's meaning.
References: KL divergence, Migacz 2017 (GTC s7310), as ONNX Runtime's entropy calibration has it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper

Method = Literal["max", "entropy", "percentile", "mse"]
EightBits = Literal["int8", "fp8"]
LARGEST = {"int8": 127.0, "fp8": 448.0}
PERCENTILE = 99.99
SAMPLED = 16384  # values kept of a tensor in one run; the maximum is taken over all
BINS, LEVELS = 2048, 128
Floats = npt.NDArray[np.floating[Any]]


@dataclass(slots=True)
class Observed:
    """What was seen of one tensor: its largest magnitude, a spread of magnitudes, and the largest one a channel."""

    largest: float
    magnitudes: Floats
    channel_largest: Floats  # [last axis]


def observe(
    model: onnx.ModelProto,
    runs: Iterable[dict[str, npt.NDArray[Any]]],
    tensors: Iterable[str],
    threads: int = 2,
) -> dict[str, Observed]:
    """Run a graph on recorded inputs and watch some of its float tensors.

    Args:
        model: the graph; its weights inside.
        runs: inputs by name.
        tensors: names of inputs or inner values.
        threads: of ONNX Runtime.

    Returns:
        What was seen, by tensor.
    """
    wanted = sorted(set(tensors))
    inputs = {v.name for v in model.graph.input}
    inner = [name for name in wanted if name not in inputs]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = {v.name for v in watched.graph.output}
    watched.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in inner if n not in outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen: dict[str, Observed] = {}
    for run in runs:
        feed = {name: np.ascontiguousarray(value) for name, value in run.items()}
        values = dict(zip(inner, session.run(inner, feed) if inner else [], strict=True)) | feed
        for name in wanted:
            now = _observed(values[name])
            seen[name] = _merged(seen[name], now) if name in seen else now
    return seen


def limit(seen: Observed, method: Method, kind: EightBits) -> float:
    """Choose where to clip a tensor.

    max: the largest magnitude.  percentile: 99.99 % of the magnitudes.  mse: argmin_c sum (|x| - q_c(|x|))^2.
    entropy: argmin_c KL(P || Q_c), P the histogram cut at c with the rest in its last bin, Q_c the same in 128 levels.

    Args:
        seen: of the tensor.
        method: see above.
        kind: whose rounding `mse` counts.

    Returns:
        c > 0; a tensor of zeros gets 1, any limit serves it.
    """
    if seen.largest == 0:
        return 1.0
    if method == "percentile":
        found = float(np.percentile(seen.magnitudes, PERCENTILE))
    elif method == "mse":
        found = _least_squares(seen, kind)
    elif method == "entropy":
        found = _least_divergence(seen)
    else:
        found = seen.largest
    return found if found > 0 else seen.largest


def rounded(values: Floats, largest: float, kind: EightBits) -> Floats:
    """Quantized and dequantized values: clipped to +-largest, rounded to the nearest level, ties to even."""
    scale = largest / LARGEST[kind]
    levels = np.clip(values / scale, -LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return np.asarray(np.rint(levels) * scale)
    return np.asarray(levels.astype(ml_dtypes.float8_e4m3fn).astype(values.dtype) * scale)


def _least_squares(seen: Observed, kind: EightBits) -> float:
    candidates = seen.largest * np.geomspace(0.05, 1, 80)
    errors = [np.square(seen.magnitudes - rounded(seen.magnitudes, c, kind)).mean() for c in candidates]
    return float(candidates[int(np.argmin(errors))])


def _least_divergence(seen: Observed) -> float:
    counts, edges = np.histogram(seen.magnitudes, bins=BINS, range=(0, seen.largest))
    counts = counts.astype(np.float64)
    best, found = np.inf, seen.largest
    for stop in range(LEVELS, BINS + 1, 8):
        reference = counts[:stop].copy()
        reference[-1] += counts[stop:].sum()
        starts = np.arange(LEVELS) * stop // LEVELS
        filled = counts[:stop] > 0
        width = np.add.reduceat(filled.astype(np.float64), starts)
        level = np.divide(
            np.add.reduceat(counts[:stop], starts), width, out=np.zeros(LEVELS), where=width > 0
        )
        candidate = np.repeat(level, np.diff(np.append(starts, stop))) * filled
        p, q = _smoothed(reference), _smoothed(candidate)
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, found = divergence, float(edges[stop])
    return found


def _smoothed(counts: Floats) -> Floats:
    """A distribution without zeros: a ten-thousandth of a count in empty bins."""
    filled = np.where(counts > 0, counts, 1e-4)
    return np.asarray(filled / filled.sum())


def _observed(values: Floats) -> Observed:
    magnitudes = np.abs(values)
    channels = magnitudes.reshape(-1, values.shape[-1]).max(axis=0)
    flat = magnitudes.ravel()
    # Evenly spread, by a fraction of a step that hits no channel more often than another.
    picked = flat[np.linspace(0, flat.size - 1, min(SAMPLED, flat.size)).astype(np.int64)]
    return Observed(float(channels.max()), picked, channels)


def _merged(a: Observed, b: Observed) -> Observed:
    return Observed(
        max(a.largest, b.largest),
        np.concatenate([a.magnitudes, b.magnitudes]),
        np.maximum(a.channel_largest, b.channel_largest),
    )
