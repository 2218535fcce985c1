"""What a change in some graphs does to anomaly maps, cheaply: everything before the change is computed once.

Of a method that scores pixels by rows, scores are taken at every second pixel of both axes and spread over the rest
before the vote; the reference is taken the same way. Other methods are run whole. Every layout of the bundle is run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from m3ad.bundle import Bundle
from m3ad.contract import GRID_SIZE, Layout
from m3ad.errors import FrameError
from m3ad.frames import Sample, read_sample
from m3ad.grid import prepare_mask
from m3ad.metrics import aupro, image_auroc, rank_correlation
from m3ad.preprocess import ModelInput, prepare, with_holes
from m3ad_runtime.onnx_graph import OnnxGraph
from m3ad_runtime.pipeline import model_arrays

from m3ad_calibrate.defects import with_defect
from m3ad_calibrate.gate import LOWEST_RANK_CORRELATION, METRICS
from m3ad_calibrate.walk import Walk, Walked

STRIDE = 2
# Image AUROC and AUPRO@1 of a handful of frames move by more than any budget while their maps rank alike by 0.9999
# (measured: 0.22 and 0.014); both are reported, and the gate judges them on all test frames.
STEADY = "aupro_30"


@dataclass(slots=True)
class Probed:
    """One frame, and what its stages made of it before anything was changed."""

    inputs: dict[str, npt.NDArray[Any]]
    pick: npt.NDArray[np.intp]  # rows whose scores are computed
    nearest: npt.NDArray[np.intp]  # for each row, which picked one stands for it
    mask: npt.NDArray[np.bool_]
    pixels: npt.NDArray[np.int32]  # [R] the scored ones, or the part's: whose ranks are compared
    known: dict[Layout, Walked]


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """What a change cost: falls of the metrics, the lowest rank correlation, and the share of the budget it uses."""

    metric_drop: dict[str, float]
    rank_correlation: float
    loss: float  # the larger of AUPRO@30's fall / budget and (1 - rank correlation) / 0.01; 1 is all of it


class Probe:
    """Frames with and without synthetic defects, and the maps that changed graphs make of them.

    Args:
        bundle: not quantized.
        samples: good frames of the validation split.
        layouts: whose heads are run.
        threads: of ONNX Runtime.

    Raises:
        FrameError: there are no samples.
    """

    def __init__(
        self,
        bundle: Bundle,
        samples: Sequence[Sample],
        layouts: Sequence[Layout] = ("fused",),
        threads: int = 2,
    ) -> None:
        if not samples:
            raise FrameError(
                "there are no good validation frames to probe with; add some to the validation split"
            )
        method = bundle.contract.method
        self.bundle, self.threads, self.layouts = bundle, threads, tuple(layouts)
        self.models = {
            g.name: onnx.load(bundle.file(f"onnx/{g.name}.onnx"))
            for g in method.graphs_of(self.layouts)
            if g.may_quantize
        }
        self.graphs = {name: self.session(model) for name, model in self.models.items()}
        self.walks = {layout: self.walk(layout, {}) for layout in self.layouts}
        # What a layout alone runs; the layouts are one network, so what they share does the same to each.
        own = [{g.name for g in method.graphs_of([layout])} for layout in self.layouts]
        shared = set.intersection(*own)
        self.own = dict(zip(self.layouts, (names - shared for names in own), strict=True))
        preprocessing = bundle.preprocessing
        self.frames = []
        for i, sample in enumerate(samples):
            frame = with_holes(read_sample(sample, preprocessing.camera), preprocessing)
            clean = prepare(frame, preprocessing)
            nothing = np.zeros((GRID_SIZE[preprocessing.geometry],) * 2, np.bool_)
            self.frames.append(self._probed(clean, nothing))
            defective, mask = with_defect(frame, i)
            self.frames.append(
                self._probed(prepare(defective, preprocessing), prepare_mask(mask, preprocessing.geometry))
            )
        self.reference = {layout: self._maps({}, layout) for layout in self.layouts}
        self.metrics = {layout: self._metrics(maps) for layout, maps in self.reference.items()}

    def session(self, model: onnx.ModelProto) -> OnnxGraph:
        """A graph in ONNX Runtime."""
        return OnnxGraph(model.SerializeToString(), self.threads)

    def walk(self, layout: Layout, changed: Mapping[str, OnnxGraph]) -> Walk:
        """A layout with some graphs in place of the bundle's."""

        def load(path: Path, threads: int) -> OnnxGraph:
            name = path.stem.removesuffix("_cpu")
            if name not in self.graphs:  # a memory, into which no plan is written
                self.graphs[name] = OnnxGraph(path, threads)
            return changed.get(name, self.graphs[name])

        folder = self.bundle.path / "onnx"
        return Walk(self.bundle.contract, layout, folder, load, self.threads)

    def loss_of(self, changed: dict[str, OnnxGraph], budget: float) -> QualityLoss:
        """Run the frames with these graphs in place of the bundle's in every layout that has them; the worst counts."""
        # Without a changed graph of a layout's own, one layout tells it.
        layouts = [n for n in self.layouts if self.own[n] & changed.keys()] or self.layouts[-1:]
        worst: QualityLoss | None = None
        for layout in layouts if changed else ():
            maps = self._maps(changed, layout)
            actual, expected = self._metrics(maps), self.metrics[layout]
            drop = {name: expected[name] - actual[name] for name in METRICS}
            rank = min(
                rank_correlation(a.ravel()[f.pixels], b.ravel()[f.pixels])
                for a, b, f in zip(self.reference[layout], maps, self.frames, strict=True)
            )
            found_loss = quality_loss(drop, rank, budget)
            if worst is None or found_loss.loss > worst.loss:
                worst = found_loss
        return worst or QualityLoss(dict.fromkeys(METRICS, 0.0), 1.0, 0.0)

    def _probed(self, prepared: ModelInput, mask: npt.NDArray[np.bool_]) -> Probed:
        pixels, nothing = prepared.point_pixel, np.zeros(0, np.intp)
        pick, nearest = nothing, nothing
        if "scored_pixel" in self.bundle.contract.method.inputs:
            pixels = prepared.scored_pixel
            y, x = np.divmod(pixels, GRID_SIZE[self.bundle.preprocessing.geometry])
            pick = np.flatnonzero((y % STRIDE == 0) & (x % STRIDE == 0))
            nearest = _nearest(np.stack([y, x], axis=1), pick)
        inputs = model_arrays(prepared)
        known: dict[Layout, Walked] = {}
        whole = Walked()
        for layout, walk in self.walks.items():
            known[layout] = walk.run(inputs, pick, whole)
            whole = Walked(known[layout].whole)
        return Probed(inputs, pick, nearest, mask, pixels, known)

    def _maps(self, changed: dict[str, OnnxGraph], layout: Layout) -> list[npt.NDArray[np.float32]]:
        walk, names = self.walk(layout, changed), frozenset(changed)
        return [walk.vote(walk.run(f.inputs, f.pick, f.known[layout], names), f.nearest) for f in self.frames]

    def _metrics(self, maps: list[npt.NDArray[np.float32]]) -> dict[str, float]:
        return metrics_of(maps, [frame.mask for frame in self.frames])


def metrics_of(
    maps: Sequence[npt.NDArray[np.float32]], masks: Sequence[npt.NDArray[np.bool_]]
) -> dict[str, float]:
    """The metrics of maps of one size whose synthetic defects lie where the masks say."""
    stacked, where = np.nan_to_num(np.stack(maps)), np.stack(masks)
    labels = np.array([mask.any() for mask in masks])
    return {
        "image_auroc": image_auroc(stacked.max(axis=(1, 2)).astype(np.float64), labels),
        "aupro_30": aupro(stacked, where, 0.30, "exact"),
        "aupro_1": aupro(stacked, where, 0.01, "exact"),
    }


def quality_loss(drop: dict[str, float], rank: float, budget: float) -> QualityLoss:
    """What these falls and this lowest rank correlation use of the budget."""
    loss = max(drop[STEADY] / budget, (1 - rank) / (1 - LOWEST_RANK_CORRELATION))
    return QualityLoss(drop, rank, loss)


def _nearest(places: npt.NDArray[np.int32], pick: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """For each place [R, 2] the position in `pick` of the nearest picked one."""
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(places[pick]).query(places)[1], np.intp)
