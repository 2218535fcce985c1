"""Which layers bear INT8 or FP8: one group at a time, and the fastest plan whose loss stays within a budget.

The loss is measured on good validation frames with and without synthetic defects. Test labels are never looked at:
a plan tuned on them would pass a gate that means nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from m3ad.errors import ArtifactError
from m3ad.method import Method
from m3ad_export.graphs.plan import QUANTIZED, Keep, NodePrecision, Plan
from m3ad_runtime.onnx_graph import OnnxGraph

from m3ad_calibrate import qdq
from m3ad_calibrate.emulate import emulated
from m3ad_calibrate.probe import Probe, QualityLoss
from m3ad_calibrate.quantize import Graph, Settings
from m3ad_calibrate.record import Feeds

Say = Callable[[str], None]
# A group is what one pattern of a plan names: a block of an encoder, or what the method declares.
BLOCK = re.compile(r"^(?P<tower>blocks\.(?:blocks\.)?\d+)\.(?P<part>attn\.(?:qkv|proj)|mlp\.fc[12])/")
# Of the budget: the gate looks at more frames, and the lowest of them counts. Measured: what used 0.4 of it on 4 frames
# with and without defects used 1.1 on 24 test frames.
TARGET = 0.2
# What a group may be brought to when it cannot bear the plan's precision, in this order.
STEPS: tuple[NodePrecision, ...] = ("int8_weights", "rest")
Move = tuple["Group", NodePrecision]


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that a plan treats alike.

    Attributes:
        name: for people.
        pattern: in a plan.
        share: of the multiply-adds of all groups.
        row_share: the part of it that grows with the scored rows.
    """

    name: str
    pattern: str
    share: float
    row_share: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What quantizing one group alone costs."""

    group: Group
    quality: QualityLoss


@dataclass(frozen=True, slots=True)
class Search:
    """The groups from worst to least, the plan that was found, and what it costs on the probe."""

    findings: list[Finding]
    plan: Plan
    quality: QualityLoss
    quantized_share: float  # of the multiply-adds
    trail: list[dict[str, Any]]
    moves: list[Move]  # promotions, in the order in which they are taken
    promoted: int  # how many of them the plan takes


def find_groups(models: dict[str, onnx.ModelProto], method: Method, rows: int, base: Plan) -> list[Group]:
    """The groups of a bundle: each block of an encoder, the mini-PointNet, and the layers of other networks.

    Args:
        models: graphs by name.
        method: whose they are.
        rows: feature rows of a typical frame, for the heads' share of the work.
        base: the plan whose products count.
    """
    work: dict[tuple[str, str], float] = {}
    by_rows: dict[tuple[str, str], float] = {}
    declared = {graph.name: graph for graph in method.graphs}
    has_fused = any("chain" not in declared[name].layouts for name in models)
    for stage, model in models.items():
        prepared = qdq.prepared(model, stage, base)
        shapes = {i.name: i.dims for i in prepared.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(prepared)
        sizes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
        }
        chosen = qdq.products(prepared, stage, base)
        for node in prepared.graph.node:
            if node.name not in chosen or node.input[1] not in shapes:
                continue
            key = _group_of(stage, node.name, method.groups)
            count = float(rows if declared[stage].axis == "rows" else _uses(node, sizes))
            # What the chain alone runs is the same layers as the fused head's; they are not counted twice.
            is_counted = not has_fused or "fused" in declared[stage].layouts
            macs = count * np.prod(shapes[node.input[1]]) if is_counted else 0.0
            work[key] = work.get(key, 0.0) + macs
            by_rows[key] = by_rows.get(key, 0.0) + (macs if declared[stage].axis == "rows" else 0.0)
    total = sum(work.values()) or 1.0
    return [
        Group(name, pattern, macs / total, by_rows[name, pattern] / total)
        for (name, pattern), macs in work.items()
    ]


def _uses(node: onnx.NodeProto, sizes: Mapping[str, list[int]]) -> float:
    """How often a frame meets each weight of a product: once a row, or a pixel that a convolution makes or spreads."""
    looked_at = node.output[0] if node.op_type == "Conv" else node.input[0]
    size = sizes.get(looked_at, [])
    outer = size[:1] + size[2:] if node.op_type in qdq.CONVOLUTIONS else size[:-1]
    return float(np.prod(outer or [1]))


def _group_of(stage: str, node: str, groups: Mapping[str, str]) -> tuple[str, str]:
    """The name and the pattern of the group a product belongs to."""
    if block := BLOCK.match(node):
        tower = block["tower"]
        name = f"{'RGB' if stage == 'rgb_extractor' else 'XYZ'} block {tower.rpartition('.')[2]}"
        return name, rf"^{stage}:{re.escape(tower)}\.(attn\.(qkv|proj)|mlp\.fc[12])/"
    for name, pattern in groups.items():
        if re.search(pattern, f"{stage}:{node}"):
            return name, pattern
    module = node.split("/")[0].split(".")[0]
    return f"{stage} {module}", rf"^{stage}:{re.escape(module)}[./]"


class Searcher:
    """The graphs of a probe, ready to be written by any plan.

    Args:
        probe: whose frames and graphs are used.
        feeds: recorded inputs by graph.
        base: the plan to start from; what it keeps stays kept.
        settings: method and engine of calibration.
        budget: of the gate.

    Raises:
        ArtifactError: no product of the bundle takes the base plan's precision.
    """

    def __init__(
        self, probe: Probe, feeds: dict[str, Feeds], base: Plan, settings: Settings, budget: float
    ) -> None:
        self.probe, self.base, self.budget = probe, base, budget
        names = [n for n in probe.models if n in feeds]
        self.graphs = {n: Graph(probe.models[n], n, feeds[n], base, settings) for n in names}
        rows = int(np.mean([len(frame.pixels) for frame in probe.frames]))
        self.groups = find_groups(
            {n: probe.models[n] for n in names}, probe.bundle.contract.method, rows, base
        )
        if not self.groups:
            raise ArtifactError(qdq.nothing_for(base, probe.bundle.path))

    def changed(self, plan: Plan) -> dict[str, OnnxGraph]:
        """The graphs in which a plan quantizes something, by name, as the CPU runs them."""
        return {
            name: self.probe.session(emulated(graph.written(plan)) if plan.half else graph.written(plan))
            for name, graph in self.graphs.items()
            if qdq.products(graph.model, name, plan)
        }

    def loss_of(self, plan: Plan) -> QualityLoss:
        """What a plan costs on the probe; graphs in which it quantizes nothing are not run."""
        return self.probe.loss_of(self.changed(plan), self.budget)

    def alone(self, group: Group) -> Plan:
        """The plan in which one group is quantized and nothing else is."""
        promoted = tuple(Keep(g.pattern, "another group", "rest") for g in self.groups if g != group)
        return replace(self.base, keep=(*self.base.keep, *promoted))

    def search(self, say: Say = lambda _: None) -> Search:
        """Rank the groups, then promote the worst for their work until the loss fits TARGET of the budget.

        A group is promoted to INT8 weights first, to the plan's rest when every group it pays for is there. The order
        is loss per multiply-add, so that what is given up is as little work as can be.
        """
        findings = []
        for i, group in enumerate(self.groups):
            quality = self.loss_of(self.alone(group))
            findings.append(Finding(group, quality))
            say(f"{i + 1} of {len(self.groups)}: {group.name} alone uses {quality.loss:.2f} of the budget")
        findings.sort(key=lambda finding: finding.quality.loss, reverse=True)
        order = sorted(findings, key=lambda f: f.quality.loss / (f.group.share + 0.01), reverse=True)
        moves = [(f.group, step) for step in STEPS for f in order]
        trail: list[dict[str, Any]] = []

        def tried(count: int) -> QualityLoss:
            quality = self.loss_of(self.with_moves(moves[:count]))
            trail.append(
                {"promoted": count, "loss": quality.loss, "rank_correlation": quality.rank_correlation}
            )
            say(f"{count} promoted: {quality.loss:.2f} of the budget")
            return quality

        # The loss falls as groups are promoted, so the smallest number that fits is found by halving.
        low, high, best = 0, len(moves), tried(0)
        if best.loss > TARGET:
            while high - low > 1:
                middle = (low + high) // 2
                quality = tried(middle)
                low, high, best = (low, middle, quality) if quality.loss <= TARGET else (middle, high, best)
            low = high
            best = self.loss_of(self.with_moves(moves[:low]))
        plan = self.with_moves(moves[:low], findings)
        promoted = {group.name for group, _ in moves[:low]}
        share = sum(group.share for group in self.groups if group.name not in promoted)
        return Search(findings, plan, best, share, trail, moves, low)

    def with_moves(self, moves: Sequence[Move], findings: Sequence[Finding] = ()) -> Plan:
        """The base plan with groups promoted; the last move of a group counts."""
        loss = {f.group: f.quality.loss for f in findings}
        final = dict(moves)
        kept = tuple(
            Keep(g.pattern, f"{g.name}: alone it uses {loss.get(g, 0):.2f} of the loss budget", precision)
            for g, precision in final.items()
        )
        # Behind the base's entries: a group's pattern may also match what those keep, and they decide first.
        return replace(self.base, keep=(*self.base.keep, *kept))


def report(search: Search) -> dict[str, Any]:
    """The search as JSON."""
    return {
        "groups": [
            {
                "name": f.group.name,
                "pattern": f.group.pattern,
                "share": round(f.group.share, 4),
                "loss": f.quality.loss,
                "rank_correlation": f.quality.rank_correlation,
                "metric_drop": f.quality.metric_drop,
            }
            for f in search.findings
        ],
        "trail": search.trail,
        "loss": search.quality.loss,
        "rank_correlation": search.quality.rank_correlation,
        "metric_drop": search.quality.metric_drop,
        "quantized_share": search.quantized_share,
    }


def save_plot(search: Search, path: Path) -> None:
    """Bars of every group's loss alone, worst first, and the budget; promoted groups are hatched."""
    from matplotlib.figure import Figure

    findings = search.findings[::-1]
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(findings)), layout="constrained")
    axes = figure.subplots()
    kept = {k.pattern for k in search.plan.keep if k.precision in (*QUANTIZED, "rest")}
    for row, finding in enumerate(findings):
        is_promoted = finding.group.pattern in kept
        axes.barh(
            row, finding.quality.loss, color="#888888" if is_promoted else "#3070b0", hatch="//" * is_promoted
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(findings)), [f"{f.group.name} ({f.group.share:.0%})" for f in findings], fontsize=7
    )
    axes.set_xlabel(
        "share of the loss budget used alone; hatched: promoted; in brackets: of the multiply-adds"
    )
    axes.set_title(
        f"{search.plan.precision}: {search.quantized_share:.0%} of the multiply-adds quantized, "
        f"{search.quality.loss:.2f} of the budget used",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
