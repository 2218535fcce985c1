"""What a benchmark computes, without a clock, server or file of its own: percentiles, ratios, time per stage.

Inference only: tensors ready -> anomaly map, as CFM timed it. End to end: files -> verdict. One frame at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

PERCENTILES = (50, 90, 99)
OWN_ENCODER = "/its rgb_extractor"  # ends the name of the ratio of a form to a stage of itself


@dataclass(frozen=True, slots=True)
class Counters:
    """What Triton has counted of one model since it was loaded; times are totals."""

    requests: int
    queue_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int

    def since(self, before: "Counters") -> "Counters":
        """What came on top of an earlier reading."""
        return Counters(*(getattr(self, f) - getattr(before, f) for f in Counters.__slots__))


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of single frames, one after the other."""

    frames: int
    frames_per_second: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    def to_json(self) -> dict[str, Any]:
        """The figures as they are printed."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage's share of one frame, in milliseconds; `uses` counts its runs per frame."""

    stage: str
    uses: float
    infer_ms: float
    queue_ms: float = 0.0
    transfer_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures as they are printed."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def ratio(numerator_ms: Sequence[float], denominator_ms: Sequence[float]) -> tuple[float, dict[str, float]]:
    """How many times longer one form takes than another on the same frames, measured in turn.

    Returns:
        The median of the frames' ratios and its spread: lowest, first and third quartile, highest.
    """
    per_frame = [n / d for n, d in zip(numerator_ms, denominator_ms, strict=True)]
    q1, q3 = percentile(per_frame, 25), percentile(per_frame, 75)
    spread = {"low": min(per_frame), "q1": q1, "q3": q3, "high": max(per_frame)}
    return median(per_frame), {name: round(value, 4) for name, value in spread.items()}


def latency(latencies_ms: Sequence[float]) -> Latency:
    """Summarise measured frames; the rate is frames over their total time."""
    total = sum(latencies_ms)
    p50, p90, p99 = (percentile(latencies_ms, p) for p in PERCENTILES)
    count = len(latencies_ms)
    return Latency(count, count / total * 1e3, total / count, p50, p90, p99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank, no interpolation)."""
    if not values or not 0 < percent <= 100:
        raise ValueError(f"expected values and a percentile in (0, 100], got {len(values)} and {percent}")
    rank = -(-len(values) * percent // 100)
    return sorted(values)[int(rank) - 1]


def stage_times(
    before: Mapping[str, Counters], after: Mapping[str, Counters], frames: int
) -> list[StageTime]:
    """Time per stage and frame between two readings of Triton's statistics."""
    times = []
    for stage, counters in after.items():
        gone = counters.since(before[stage])
        per_frame = 1e-6 / frames
        times.append(
            StageTime(
                stage,
                gone.requests / frames,
                gone.infer_ns * per_frame,
                gone.queue_ns * per_frame,
                (gone.input_ns + gone.output_ns) * per_frame,
            )
        )
    return times


def mean_stage_times(readings: Sequence[Mapping[str, float]]) -> list[StageTime]:
    """Time per stage and frame from the in-process runner's own readings; `mfm again` counts as mfm."""
    times: dict[str, list[float]] = {}
    for reading in readings:
        for label, milliseconds in reading.items():
            times.setdefault(label.removesuffix(" again"), []).append(milliseconds)
    count = len(readings)
    return [StageTime(stage, len(values) / count, sum(values) / count) for stage, values in times.items()]
