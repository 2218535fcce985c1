"""What a lattice costs, alone or with changed graphs: good frames, each once as it is and once with a synthetic defect.

The rows of scores do not depend on each other, so a frame goes through the head once, at every pixel; each lattice then
votes on its own part of these scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from m3ad.bundle import Bundle
from m3ad.contract import GRID_SIZE
from m3ad.errors import ArtifactError
from m3ad.frames import Sample, read_sample
from m3ad.grid import prepare_mask
from m3ad.metrics import rank_correlation
from m3ad.preprocess import ModelInput, prepare, with_holes
from m3ad.scored import Lattice, on_lattice
from m3ad_export.graphs.vote import with_coverage
from m3ad_runtime.onnx_graph import OnnxGraph
from m3ad_runtime.pipeline import model_arrays

from m3ad_calibrate.defects import with_defect
from m3ad_calibrate.gate import METRICS
from m3ad_calibrate.probe import QualityLoss, metrics_of, quality_loss
from m3ad_calibrate.walk import SCORES, Walk, Walked

LATTICES: tuple[Lattice, ...] = ("half", 2, 3, 4)
Say = Callable[[str], None]
Graphs = Mapping[str, OnnxGraph]


@dataclass(frozen=True, slots=True)
class Trial:
    """A lattice, the share of the rows that it scores, and what it cost on the probed frames."""

    lattice: Lattice
    share: float
    quality: QualityLoss


@dataclass(slots=True)
class Scored:
    """One frame, and what the stages made of it at every pixel."""

    inputs: dict[str, npt.NDArray[Any]]
    mask: npt.NDArray[np.bool_]
    known: Walked


class LatticeProbe:
    """Frames scored at every pixel in the fused layout, and the maps that lattices and changed graphs make of them.

    Args:
        source: scores every pixel, is not quantized and has the fused layout.
        samples: good frames of the validation split.
        walk: some graphs in place of the source's -> its fused layout.
        threads: of ONNX Runtime.

    Raises:
        ArtifactError: the bundle is quantized, scores a lattice already, has no fused layout, or its method takes none.
    """

    def __init__(
        self,
        source: Bundle,
        samples: Sequence[Sample],
        walk: Callable[[Graphs], Walk],
        threads: int = 2,
    ) -> None:
        self.walk = walk
        model = with_coverage(onnx.load(source.file("onnx/head_vote.onnx")))
        self.vote = OnnxGraph(model.SerializeToString(), threads)
        opened, preprocessing = walk({}), source.preprocessing
        nothing = np.zeros((GRID_SIZE[preprocessing.geometry],) * 2, np.bool_)
        self.frames: list[Scored] = []

        def score(prepared: ModelInput, mask: npt.NDArray[np.bool_]) -> None:
            inputs = model_arrays(prepared)
            known = opened.run(inputs, np.arange(len(prepared.scored_pixel)))
            self.frames.append(Scored(inputs, mask, known))

        for i, sample in enumerate(samples):
            frame = with_holes(read_sample(sample, preprocessing.camera), preprocessing)
            score(prepare(frame, preprocessing), nothing)
            defective, mask = with_defect(frame, i)
            score(prepare(defective, preprocessing), prepare_mask(mask, preprocessing.geometry))
        self.reference = self._maps("all", {})
        self.metrics = metrics_of(self.reference, [frame.mask for frame in self.frames])

    def share(self, lattice: Lattice) -> float:
        """The share of the rows that a lattice scores."""
        every = [frame.inputs["scored_pixel"] for frame in self.frames]
        return float(np.mean([len(on_lattice(pixels, lattice)) / len(pixels) for pixels in every]))

    def loss_of(self, lattice: Lattice, budget: float, changed: Graphs | None = None) -> QualityLoss:
        """What a lattice costs against every pixel of the source, with these graphs in place of the source's."""
        maps = self._maps(lattice, changed or {})
        found = metrics_of(maps, [frame.mask for frame in self.frames])
        parts = [frame.inputs["point_pixel"] for frame in self.frames]
        rank = min(
            rank_correlation(a.ravel()[part], b.ravel()[part])
            for a, b, part in zip(self.reference, maps, parts, strict=True)
        )
        return quality_loss({n: self.metrics[n] - found[n] for n in METRICS}, rank, budget)

    def _maps(self, lattice: Lattice, changed: Graphs) -> list[npt.NDArray[np.float32]]:
        walk = self.walk(changed)
        maps = []
        for frame in self.frames:
            every = frame.inputs["scored_pixel"]
            scored = on_lattice(every, lattice)
            rows = np.flatnonzero(np.isin(every, scored))
            known = Walked(frame.known.whole, {SCORES: frame.known.picked[SCORES][:, rows]})
            made = walk.run(frame.inputs, rows, known, frozenset(changed)) if changed else known
            scores = np.ascontiguousarray(made.picked[SCORES])
            point_pixel = frame.inputs["point_pixel"]
            voted = self.vote({"scores": scores, "scored_pixel": scored, "point_pixel": point_pixel})
            maps.append(voted["anomaly_map"])
        return maps


def measure(
    source: Bundle,
    samples: Sequence[Sample],
    budget: float,
    lattices: Sequence[Lattice] | None = None,
    say: Say = lambda _: None,
    threads: int = 2,
) -> list[Trial]:
    """What each lattice costs on good frames, each once as it is and once with a synthetic defect.

    Args:
        source: see `LatticeProbe`.
        samples: good frames of the validation split.
        budget: as of the gate.
        lattices: which; `LATTICES` if left out.
        say: is told of each lattice.
        threads: of ONNX Runtime.

    Raises:
        ArtifactError: see `LatticeProbe`.
    """
    verify_source(source)
    opened = Walk(source.contract, "fused", source.path / "onnx", threads=threads)
    probe = LatticeProbe(source, samples, lambda _: opened, threads)
    trials = []
    for lattice in lattices or LATTICES:
        trials.append(Trial(lattice, probe.share(lattice), probe.loss_of(lattice, budget)))
        say(
            f"lattice {lattice}: {trials[-1].share:.1%} of the rows, {trials[-1].quality.loss:.2f} of the budget"
        )
    return trials


def verify_source(source: Bundle) -> None:
    """Check that a bundle can be given a lattice.

    Raises:
        ArtifactError: it is quantized, scores a lattice already, has no fused layout, or its method takes none.
    """
    if source.manifest.precision is not None:
        raise ArtifactError(f"{source.path} is quantized; give the bundle it was made from a lattice first")
    if source.preprocessing.lattice != "all":
        raise ArtifactError(
            f"{source.path} scores the lattice {source.preprocessing.lattice} already; start from the bundle that "
            "scores all pixels"
        )
    if not source.contract.method.takes_lattice:
        raise ArtifactError(
            f"{source.contract.method.title} scores every pixel, no lattice is for it; find a precision plan alone: "
            "m3ad-calibrate sensitivity"
        )
    if "fused" not in source.manifest.layouts:
        raise ArtifactError(f"{source.path} has no layout fused; export it with both: m3ad-export bundle")
