"""The gate of a bundle of another precision or lattice: what it cost on the test split, and whether it passes.

Metrics are those of `m3ad.metrics`, AUPRO in its exact form. Nothing is fitted here; the test split is only looked at.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from m3ad.bundle import Bundle
from m3ad.contract import Layout
from m3ad.errors import ArtifactError, FrameError
from m3ad.frames import Sample, read_sample, read_sample_mask
from m3ad.grid import prepare_mask
from m3ad.limits import Limits, verdict
from m3ad.metrics import aupro, image_auroc, rank_correlation
from m3ad.preprocess import ModelInput, prepare
from m3ad_runtime.pipeline import Pipeline, model_arrays
from m3ad_runtime.stages import cpu_stage

from m3ad_calibrate.emulate import runnable
from m3ad_calibrate.record import onnx_hashes

BUDGET = 0.005
LOWEST_RANK_CORRELATION = 0.99
TIMED_FRAMES, TIMED_RUNS = 2, 3
METRICS = ("image_auroc", "aupro_30", "aupro_1")
Say = Callable[[str], None]
Changed = Literal["quantized", "lattice"]


class Runner:
    """A bundle's layouts on the CPU, graphs read from `folder`; what they share runs once a frame."""

    def __init__(self, bundle: Bundle, layouts: Sequence[Layout], folder: Path, threads: int = 2) -> None:
        self.pipelines = {}
        contract = bundle.contract
        functions: dict[str, Any] = {}
        for layout in layouts:
            wiring = contract.steps(layout)
            for step in wiring:
                if step.stage not in functions:
                    functions[step.stage] = cpu_stage(step.stage, folder, contract, threads)
            self.pipelines[layout] = Pipeline(wiring, functions)
        self.functions = functions

    def maps(self, prepared: ModelInput) -> dict[Layout, tuple[npt.NDArray[np.float32], float]]:
        """The anomaly map [224, 224] and the score of each layout."""
        values: dict[str, Any] = dict(model_arrays(prepared))
        found: dict[Layout, tuple[npt.NDArray[np.float32], float]] = {}
        run: set[tuple[str, ...]] = set()
        for layout, pipeline in self.pipelines.items():
            for step in pipeline.wiring:
                use = (step.stage, *step.inputs.values())
                if use in run:
                    continue
                run.add(use)
                results = self.functions[step.stage]({name: values[v] for name, v in step.inputs.items()})
                values.update({value: results[name] for name, value in step.outputs.items()})
            found[layout] = values["anomaly_map"], float(values["score"][0])
        return found

    def frame_ms(self, prepared: ModelInput, layout: Layout) -> float:
        """Milliseconds from prepared tensors to the map."""
        started = time.perf_counter()
        self.pipelines[layout].run(model_arrays(prepared))
        return (time.perf_counter() - started) * 1e3


@dataclass(slots=True)
class Results:
    """What a layout made of a split: maps [K, 224, 224] and scores [K]."""

    maps: list[npt.NDArray[np.float32]]
    scores: list[float]


def gate(
    bundle: Bundle,
    source: Bundle,
    samples: Sequence[Sample],
    budget: float = BUDGET,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Hold a bundle of another precision or lattice against its source on a test split.

    Args:
        bundle: quantized, of another lattice, or both.
        source: what it was made from.
        samples: good and defective frames with masks.
        budget: how much image AUROC, AUPRO@30 % and AUPRO@1 % may each fall.
        say: is told of the frames.

    Returns:
        The manifest's `gate`: passed, the figures of each layout, and the CPU's frame times.

    Raises:
        ArtifactError: the bundle is as it was trained, or from another source.
        FrameError: a frame cannot be read, or the split lacks good or defective ones.
    """
    _verify_pair(bundle, source)
    if not any(s.is_good for s in samples) or all(s.is_good for s in samples):
        raise FrameError(
            "the gate needs good and defective test frames; name a category with both in its test split"
        )
    layouts: list[Layout] = bundle.manifest.layouts
    reference = Runner(source, layouts[-1:], source.path / "onnx")
    half = bundle.manifest.precision.half if bundle.manifest.precision else None
    with runnable(bundle.path / "onnx", bundle.contract.method, half is not None) as folder:
        other = Runner(bundle, layouts, folder)
    before, after = Results([], []), {layout: Results([], []) for layout in layouts}
    ranks: dict[Layout, list[float]] = {layout: [] for layout in layouts}
    masks: list[npt.NDArray[np.bool_]] = []
    timed: list[tuple[ModelInput, ModelInput]] = []
    for i, sample in enumerate(samples):
        frame = read_sample(sample, source.preprocessing.camera)
        prepared, changed = (prepare(frame, each.preprocessing) for each in (source, bundle))
        mask = read_sample_mask(sample, (frame.rgb.shape[0], frame.rgb.shape[1]))
        masks.append(prepare_mask(mask, source.preprocessing.geometry))
        (full,) = reference.maps(prepared).values()
        _append(before, full)
        for layout, result in other.maps(changed).items():
            _append(after[layout], result)
            # Background holds ties that agree by themselves; the part's own pixels are compared.
            pixels = prepared.point_pixel
            ranks[layout].append(rank_correlation(full[0].ravel()[pixels], result[0].ravel()[pixels]))
        if len(timed) < TIMED_FRAMES:
            timed.append((prepared, changed))
        say(f"gated {i + 1} of {len(samples)} frames")
    # ONNX Runtime has no bf16 on CPUs; fp16 it runs in its own way, whose time is the one a user sees.
    native = {None: other, "fp16": None, "bf16": None}[half]
    if half == "fp16":
        native = Runner(bundle, layouts[-1:], bundle.path / "onnx")
    label: Changed = "quantized" if bundle.manifest.precision else "lattice"
    own, kept = bundle.manifest.threshold.limits, source.manifest.threshold.limits
    threshold = abs(kept.reject) or 1.0
    labels, all_masks = np.array([not s.is_good for s in samples]), np.stack(masks)
    wanted = _metrics(before, all_masks, labels)
    figures = {}
    for layout in layouts:
        found = _metrics(after[layout], all_masks, labels)
        figures[layout] = {
            **{n: {"source": wanted[n], label: found[n], "drop": wanted[n] - found[n]} for n in METRICS},
            "largest_score_change": float(
                np.abs(np.subtract(after[layout].scores, before.scores)).max() / threshold
            ),
            "verdicts_changed": sum(
                verdict_of(a, own) != verdict_of(b, kept)
                for a, b in zip(after[layout].scores, before.scores, strict=True)
            ),
            "rank_correlation": {"lowest": min(ranks[layout]), "mean": float(np.mean(ranks[layout]))},
        }
    return {
        "passed": not failures(figures, budget),
        "accepted": None,
        "budget": budget,
        "lowest_rank_correlation": LOWEST_RANK_CORRELATION,
        "frames": len(samples),
        "defective": int(labels.sum()),
        "limits_kept": own == kept,
        "source_onnx": onnx_digest(source),
        "emulated": half is not None,
        "figures": figures,
        "frame_ms": frame_times(reference, native, timed, layouts[-1], label) if native else None,
    }


def verdict_of(score: float, limits: Limits) -> str:
    """The verdict of a score; of one that is no number there is none."""
    return verdict(score, limits) if np.isfinite(score) else "none"


def failures(figures: dict[Layout, Any], budget: float) -> list[str]:
    """What a bundle fails on, in words; nothing when it passes."""
    found = []
    for layout, values in figures.items():
        # A NaN is no pass: every comparison is written so that it fails.
        found += [
            f"{layout} {name} falls by {values[name]['drop']:.4f}, {budget:g} is allowed"
            for name in METRICS
            if not values[name]["drop"] <= budget
        ]
        lowest = values["rank_correlation"]["lowest"]
        if not lowest >= LOWEST_RANK_CORRELATION:
            found.append(f"{layout} maps rank alike by {lowest:.4f} only, {LOWEST_RANK_CORRELATION} is asked")
    return found


def frame_times(
    reference: Runner,
    other: Runner,
    frames: Sequence[tuple[ModelInput, ModelInput]],
    layout: Layout,
    label: Changed,
) -> dict[str, Any]:
    """Milliseconds a frame on this CPU, both bundles in turn, and the ratio of their medians."""
    times: dict[str, list[float]] = {"source": [], label: []}
    for _ in range(TIMED_RUNS):
        for prepared, changed in frames:
            times["source"].append(reference.frame_ms(prepared, layout))
            times[label].append(other.frame_ms(changed, layout))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {"layout": layout, **medians, "ratio": medians[label] / medians["source"]}


def summary(record: dict[str, Any], told: str) -> str:
    """The gate in a few lines for people; `told` names the precision or the lattice."""
    lines = []
    pairs = record["defective"] * (record["frames"] - record["defective"])
    if pairs * record["budget"] < 1:
        lines.append(
            f"one pair of test parts that change places is {1 / pairs:.4f} of image AUROC, more than the budget of "
            f"{record['budget']:g}: this split cannot show it, add test parts or raise --budget"
        )
    for layout, values in record["figures"].items():
        parts = [
            f"{n} {values[n]['source']:.4f} -> {values[n]['source'] - values[n]['drop']:.4f}" for n in METRICS
        ]
        rank = values["rank_correlation"]
        lines.append(
            f"{layout}: {', '.join(parts)}; rank correlation {rank['lowest']:.4f} lowest, {rank['mean']:.4f} mean; "
            f"scores move by up to {values['largest_score_change']:.1%} of the threshold, "
            f"verdicts of {values['verdicts_changed']} of {record['frames']} parts change"
        )
    t = record["frame_ms"]
    if t is None:
        return "\n".join([*lines, f"CPU frame time: none, ONNX Runtime does not run {told} on CPUs"])
    slower = t["ratio"] > 1
    lines.append(
        f"CPU frame time ({t['layout']}): source {t['source']:.0f} ms, {told} {t['source'] * t['ratio']:.0f} ms, "
        f"{t['ratio']:.2f} times the source's{': slower on this CPU' if slower else ''}"
    )
    return "\n".join(lines)


def onnx_digest(bundle: Bundle) -> str:
    """One sha256 for all graphs of a bundle; thresholds and rigs may change, this does not."""
    return hashlib.sha256(json.dumps(onnx_hashes(bundle), sort_keys=True).encode()).hexdigest()


def _verify_pair(bundle: Bundle, source: Bundle) -> None:
    changes = [c for c in (bundle.manifest.precision, bundle.manifest.lattice) if c is not None]
    if not changes:
        raise ArtifactError(
            f"{bundle.path} is not quantized, nor is its lattice another than its detector's: there is nothing to "
            "gate; write one with m3ad-calibrate quantize or lattice"
        )
    # A lattice that was quantized holds against the lattice in fp32, and against what both were made from.
    if onnx_digest(source) not in [change.source_onnx for change in changes]:
        raise ArtifactError(
            f"{bundle.path} was not made from {source.path}; gate it against its source, or write it again"
        )


def _append(results: Results, found: tuple[npt.NDArray[np.float32], float]) -> None:
    results.maps.append(found[0])
    results.scores.append(found[1])


def _metrics(
    results: Results, masks: npt.NDArray[np.bool_], labels: npt.NDArray[np.bool_]
) -> dict[str, float]:
    maps, scores = np.stack(results.maps), np.array(results.scores, np.float64)
    if not np.isfinite(maps).all():
        return dict.fromkeys(METRICS, 0.0)  # overflow: as bad as it gets, and JSON has no word for NaN
    return {
        "image_auroc": image_auroc(scores, labels),
        "aupro_30": aupro(maps, masks, 0.30, "exact"),
        "aupro_1": aupro(maps, masks, 0.01, "exact"),
    }
