"""How near a lattice's scores come to those of every pixel, with the second pass and without: a table.

usage: python tests/runtime/refined_scores.py BUNDLE DATA [LATTICE ...]

BUNDLE scores a lattice (`m3ad-calibrate lattice`), so that its vote smooths coverage, too, and every score here is of
that vote. Every pixel of each validation and test frame of DATA is scored once; what a lattice scores is some of that,
as rows do not depend on each other.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import Bundle
from m3ad.frames import find_samples, read_sample
from m3ad.limits import Limits
from m3ad.preprocess import prepare
from m3ad.scored import Lattice, lattice_of, on_lattice
from m3ad_runtime.pipeline import Inspector, model_arrays
from m3ad_runtime.refine import around, is_full, merged
from m3ad_runtime.stages import TiledHead, cpu_form

CLOSE = 1e-3  # of the full score
HEADER = (
    "| lattice | rows, without | with (largest) | largest change of a score, without | with "
    "| frames within 1e-3, without | with |"
)
Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Row:
    """What was found of a lattice: parts of the rows that were scored, and changes in parts of the full score."""

    coarse_rows: list[float] = field(default_factory=list)
    refined_rows: list[float] = field(default_factory=list)
    coarse: list[float] = field(default_factory=list)
    refined: list[float] = field(default_factory=list)

    def line(self, lattice: Lattice) -> str:
        """As Markdown."""
        frames, near = (
            len(self.coarse),
            [sum(x <= CLOSE for x in each) for each in (self.coarse, self.refined)],
        )
        return (
            f"| {lattice} | {np.mean(self.coarse_rows):.1%} | {np.mean(self.refined_rows):.1%} "
            f"({max(self.refined_rows):.1%}) | {max(self.coarse):.1%} | {max(self.refined):.2%} "
            f"| {near[0]} of {frames} | {near[1]} of {frames} |"
        )


class Compared:
    """A fused head on every pixel that notes what each lattice would have scored, with and without a second pass."""

    def __init__(self, head: TiledHead, limit: float, rows: dict[Lattice, Row]) -> None:
        self.head, self.limit, self.rows = head, limit, rows

    def __call__(self, arrays: Arrays) -> Arrays:
        every, scores = arrays["scored_pixel"], self.head.scores(arrays)

        def vote(pixels: npt.NDArray[np.int32]) -> Arrays:
            picked = np.ascontiguousarray(scores[:, np.searchsorted(every, pixels)])
            return self.head.vote(
                {"scores": picked, "scored_pixel": pixels, "point_pixel": arrays["point_pixel"]}
            )

        full = vote(every)
        for lattice, row in self.rows.items():
            pixels = on_lattice(every, lattice)
            coarse = vote(pixels)
            more = around(coarse["anomaly_map"], pixels, every, self.limit)
            both = np.sort(np.concatenate([pixels, more]))
            refined = merged(coarse, vote(both), is_full(both, every)) if len(more) else coarse
            row.coarse_rows.append(len(pixels) / len(every))
            row.refined_rows.append(len(both) / len(every))
            row.coarse.append(change(coarse, full))
            row.refined.append(change(refined, full))
        return full


def change(outputs: Arrays, full: Arrays) -> float:
    """|score - full score| / full score."""
    return float(abs(outputs["score"][0] - full["score"][0]) / full["score"][0])


def main() -> int:
    """Score the frames and print a row for each lattice."""
    if len(sys.argv) < 3:
        print("usage: python tests/runtime/refined_scores.py BUNDLE DATA [LATTICE ...]", file=sys.stderr)
        return 2
    path, data, *texts = sys.argv[1:]
    bundle = Bundle.open(Path(path))
    if bundle.preprocessing.lattice == "all":
        print(f"error: {path} scores every pixel; give what `m3ad-calibrate lattice` wrote", file=sys.stderr)
        return 1
    rows = {lattice_of(text): Row() for text in texts or ("half", "2", "3", "4")}
    threshold = bundle.manifest.threshold
    inspector = Inspector(bundle, "fused", runtime="onnxruntime")
    head = cpu_form("head", bundle.path / "onnx", bundle.contract, inspector.threads)
    assert isinstance(head, TiledHead)
    limit = Limits(threshold.value, threshold.review).lowest
    inspector.pipeline.functions["head"] = Compared(head, limit, rows)
    every_pixel = replace(inspector.preprocessing, lattice="all")
    for split in ("validation", "test"):
        for sample in find_samples(Path(data), split):
            inspector.pipeline.run(model_arrays(prepare(read_sample(sample), every_pixel)))
    print(HEADER, "|---" * HEADER.count(" | ") + "|---|", sep="\n")
    for lattice, row in rows.items():
        print(row.line(lattice))
    return 0


if __name__ == "__main__":
    sys.exit(main())
