"""A frame through one layout, what works row by row on some of the scored rows only.

The wiring is the contract's; the stages are the runtime's with whatever graphs are handed in. Recording taps what goes
into each graph; the probe runs again only what a changed graph reaches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import Layout, Step
from m3ad.method import Contract
from m3ad_runtime.banks import NearestBanks
from m3ad_runtime.onnx_graph import Arrays, OnnxGraph
from m3ad_runtime.stages import GroupedEncoder, PixelLayer, TiledHead, cpu_form
from m3ad_runtime.windows import Windowed, whole_grid

Values = dict[str, npt.NDArray[Any]]
Tap = Callable[[str, Arrays], None]  # a graph's name and its inputs
SCORES = "scores"  # of a fused head, [pairs, picked]
CLOUD = ("xyz_tokens", "centers", "points", "point_pixel", "scored_pixel")


@dataclass(slots=True)
class Walked:
    """What a frame's stages made.

    Attributes:
        whole: values that are complete, by name.
        picked: rows of the picked pixels, by name.
    """

    whole: Values = field(default_factory=dict)
    picked: Values = field(default_factory=dict)


class Walk:
    """One layout of a bundle, up to the stage that makes the map.

    Args:
        contract: the bundle's.
        layout: which.
        folder: of the graphs.
        load: path and threads -> the graph.
        threads: of ONNX Runtime.
    """

    def __init__(
        self,
        contract: Contract,
        layout: Layout,
        folder: Path,
        load: Callable[[Path, int], OnnxGraph] = OnnxGraph,
        threads: int = 2,
    ) -> None:
        self.contract, self.method = contract, contract.method
        self.table = contract.stages
        self.steps = contract.steps(layout)
        names = dict.fromkeys(step.stage for step in self.steps)
        self.stages = {name: cpu_form(name, folder, contract, threads, load) for name in names}
        self.last = self.steps[-1]
        # A stage that looks at all rows at once needs them whole.
        self.needed_whole = {
            value
            for step in self.steps[:-1]
            if not self.method.works_by_rows(step.stage)
            for value in step.inputs.values()
        }

    def run(
        self,
        inputs: Arrays,
        pick: npt.NDArray[np.intp],
        known: Walked | None = None,
        changed: frozenset[str] = frozenset(),
        tap: Tap | None = None,
    ) -> Walked:
        """Run a frame's stages; the map is `vote`'s.

        Args:
            inputs: the pipeline's.
            pick: positions among the scored pixels; rows of these are made.
            known: what an earlier run made.
            changed: graphs that are others since; what they do not reach is taken from `known`.
            tap: is told what goes into each graph.
        """
        walked = Walked(dict(inputs))
        fresh: set[str] = set()
        for step in self.steps:
            outputs = [SCORES] if isinstance(self.stages[step.stage], TiledHead) else [*step.outputs.values()]
            is_reached = not fresh.isdisjoint(step.inputs.values()) or not changed.isdisjoint(
                self.method.graphs_in(step.stage)
            )
            if known and not is_reached and all(n in known.whole or n in known.picked for n in outputs):
                walked.whole |= {n: known.whole[n] for n in outputs if n in known.whole}
                walked.picked |= {n: known.picked[n] for n in outputs if n in known.picked}
                continue
            fresh.update(outputs)
            self._run_step(step, walked, pick, tap)
        return walked

    def vote(self, walked: Walked, nearest: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """The anomaly map, in which the picked pixel that `nearest` names stands for each scored one."""
        stage = self.stages[self.last.stage]
        if isinstance(stage, TiledHead):
            pixels = {name: walked.whole[name] for name in ("scored_pixel", "point_pixel")}
            scores = np.ascontiguousarray(walked.picked[SCORES][:, nearest])
            voted = stage.vote({"scores": scores, **pixels})
        else:
            arrays = {
                name: walked.picked[value][nearest] if value in walked.picked else walked.whole[value]
                for name, value in self.last.inputs.items()
            }
            voted = stage(arrays)
        anomaly_map: npt.NDArray[np.float32] = voted["anomaly_map"]
        return anomaly_map

    def _run_step(self, step: Step, walked: Walked, pick: npt.NDArray[np.intp], tap: Tap | None) -> None:
        stage, by_rows = self.stages[step.stage], self.method.works_by_rows(step.stage)
        if step is self.last and not isinstance(stage, TiledHead):
            return
        tensors = {t.name: t for t in self.table[step.stage].inputs}

        def rows_of(name: str, value: str) -> npt.NDArray[Any]:
            if value in walked.picked:
                return walked.picked[value]
            return walked.whole[value][pick] if tensors[name].dims[0] == "R" else walked.whole[value]

        whole = {n: walked.whole[v] for n, v in step.inputs.items() if v in walked.whole}
        arrays = {n: rows_of(n, v) for n, v in step.inputs.items()} if by_rows else whole
        feeds = self._feeds(step.stage, arrays, walked) if tap else {}
        if tap:
            for graph, values in feeds.items():
                tap(graph, values)
        results: Arrays
        if isinstance(stage, TiledHead):
            walked.picked[SCORES] = stage.scores(arrays) if not tap else np.zeros((0, 0), np.float32)
            return
        if isinstance(stage, GroupedEncoder) and feeds:  # sampled and grouped already
            results = stage.encode(next(iter(feeds.values())))
        else:
            results = stage(arrays)
        target = walked.picked if by_rows else walked.whole
        target.update({value: results[name] for name, value in step.outputs.items()})
        if by_rows and self.needed_whole.intersection(step.outputs.values()):
            results = stage(whole)
            walked.whole.update({value: results[name] for name, value in step.outputs.items()})

    def _feeds(self, name: str, arrays: Arrays, walked: Walked) -> dict[str, Arrays]:
        """What goes into the graphs of a stage, by graph."""
        stage, graphs = self.stages[name], self.method.graphs_in(name)
        if isinstance(stage, GroupedEncoder):
            return {graphs[0]: stage.feeds(arrays)}
        if isinstance(stage, PixelLayer):
            # By the groups in either layout: as many for every frame.
            return {graphs[0]: stage.feeds({n: walked.whole[n] for n in CLOUD})}
        if isinstance(stage, Windowed):
            # The whole grid, as an engine runs it: as large for every frame.
            return {graphs[0]: {**arrays, **whole_grid(arrays["scored_pixel"], stage.form.window)._asdict()}}
        if isinstance(stage, TiledHead):
            tokens = {n: arrays[n] for n in stage.tokens.inputs}
            spread = stage.spread(arrays)
            rows = {n: spread[n].operator.apply(spread[n].tokens) for n in stage.rows.inputs}
            return {graphs[0]: tokens, graphs[1]: rows}
        if isinstance(stage, NearestBanks):
            return {graphs[0]: {n: arrays[n] for n in stage.reads}}
        return {graphs[0]: {n: arrays[n] for n in stage.inputs}} if isinstance(stage, OnnxGraph) else {}
