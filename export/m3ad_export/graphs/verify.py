"""Checks of the ONNX files that hold custom ops: the contract's tensors, and nothing sampled once and for all."""

from pathlib import Path

import onnx
from m3ad.contract import OP_DOMAIN, OPS, Stage
from m3ad.errors import ArtifactError

from m3ad_export.graphs.compose import value_info

# What a custom op may be given once and for all: weights, and every cell of a grid where the stage takes no pixels.
MAY_BE_CONSTANT = {
    "OneClassSvm": ("support_vectors", "coefficients", "rho"),
    "TokenInterpolate": ("scored_pixel",),
}


def verify_interface(path: Path, stage: Stage) -> None:
    """Check that a file's inputs and outputs are the contract's and that the ONNX checker accepts it.

    Raises:
        ArtifactError: it differs.
    """
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(path, load_external_data=False)
    actual = [v.SerializeToString() for v in (*model.graph.input, *model.graph.output)]
    expected = [value_info(t).SerializeToString() for t in (*stage.inputs, *stage.outputs)]
    if actual != expected:
        names = [v.name for v in (*model.graph.input, *model.graph.output)]
        raise ArtifactError(f"{path} has the tensors {names}, the contract's stage {stage.name} has others")


def values_read(node: onnx.NodeProto) -> set[str]:
    """The values a node reads, those that the body of a loop takes from the graph around it included."""
    inner = (n for attribute in node.attribute for n in attribute.g.node)
    return set(node.input).union(*(values_read(n) for n in inner))


def verify_not_frozen(path: Path, *, has_ops: bool = True) -> None:
    """Check that every graph input reaches an output and that nothing a custom op reads is a constant.

    A tracer that samples once writes the indices as constants; the graph then no longer depends on `points`.

    Args:
        path: of the graph.
        has_ops: whether there must be a custom op.

    Raises:
        ArtifactError: an input is unused, or a custom op reads indices or points that are constants.
    """
    model = onnx.load(path, load_external_data=False)
    needed = {v.name for v in model.graph.output}
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= values_read(node)
    ignored = [v.name for v in model.graph.input if v.name not in needed]
    taken = {v.name for v in model.graph.input}
    live = {*taken}
    for node in model.graph.node:
        if node.domain == OP_DOMAIN:
            given = MAY_BE_CONSTANT.get(node.op_type, ())
            ignored += [
                f"{node.op_type}'s {name}"
                for name, value in zip(OPS[node.op_type].inputs, node.input, strict=True)
                if value not in live and not (name in given and name not in taken)
            ]
        if live & set(node.input):
            live |= set(node.output)
    if ignored or (has_ops and not any(node.domain == OP_DOMAIN for node in model.graph.node)):
        raise ArtifactError(
            f"{path}: sampling was frozen into the graph ({', '.join(ignored) or 'no m3ad node'} does not depend on "
            f"the points); keep the m3ad ops out of the traced module"
        )
