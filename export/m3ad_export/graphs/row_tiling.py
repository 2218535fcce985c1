"""The 3D encoder as a CPU runs it best: the mini-PointNet's rows in parts that stay in a cache from product to product.

A device wants few large launches, so its graph stays whole; both have the same nodes and weights.
"""

import math

import onnx
import onnx_graphsurgeon as gs
from onnx import shape_inference

from m3ad_export.graphs.surgery import edited

# 2048 rows of 512 channels are 4 MiB; 8 and 32 parts are about as fast, one is slower (MEASUREMENTS.md).
CPU_PARTS = 16
# What works on each row by itself. All else reads whole values, the batch norms' statistics first of all.
BETWEEN = (
    "Gemm",
    "MatMul",
    "Add",
    "Sum",
    "Mul",
    "Relu",
    "Reshape",
    "Cast",
    "QuantizeLinear",
    "DequantizeLinear",
)
LAST = "ReduceMax"


def row_tiled(encoder: onnx.ModelProto, parts: int = CPU_PARTS) -> onnx.ModelProto:
    """A copy of the dense encoder that takes the rows from the first ReLU to each maximum of a group in parts.

    There are as many parts as divide both the groups and `parts`; with one, nothing changes.
    """
    (neighborhood,) = (v for v in encoder.graph.input if v.name == "neighborhood")
    parts = math.gcd(neighborhood.type.tensor_type.shape.dim[0].dim_value, parts)
    if parts == 1:
        return encoder
    return edited(shape_inference.infer_shapes(encoder), lambda graph: _Tiling(graph, parts).write())


class _Tiling:
    """Nodes in a new order: those of a chain part by part, as soon as another node wants their result."""

    def __init__(self, graph: gs.Graph, parts: int) -> None:
        self.graph, self.parts, self.tensors = graph, parts, graph.tensors()
        self.rows = {next(node for node in graph.nodes if node.op == "Relu").outputs[0].name}
        self.pieces: dict[str, list[gs.Variable]] = {}  # of values that exist as <name>.0, <name>.1, ...

    def write(self) -> None:
        """Change the graph."""
        nodes: list[gs.Node] = []
        chain: list[gs.Node] = []
        for node in self.graph.nodes:
            # Quantized layers subtract a negated bias; the statistics subtract a mean.
            is_row_by_row = node.op in (*BETWEEN, LAST) or (
                node.op == "Sub" and isinstance(node.inputs[1], gs.Constant)
            )
            if is_row_by_row and any(t.name in self.rows for t in node.inputs):
                chain.append(node)
                self.rows.update(t.name for t in node.outputs if node.op != LAST)
                continue
            if any(maker in chain for t in node.inputs for maker in t.inputs):
                nodes += self._in_tiles(chain)
                chain = []
            nodes.append(node)
        self.graph.nodes = nodes

    def _in_tiles(self, chain: list[gs.Node]) -> list[gs.Node]:
        copies = [self._part_of(node, part) for part in range(self.parts) for node in chain]
        split = [
            gs.Node("Split", f"{n}/Split", {"axis": 0, "num_outputs": self.parts}, [self.tensors[n]], pieces)
            for n, pieces in self.pieces.items()
            if not pieces[0].inputs
        ]
        made = [tensor for node in chain for tensor in node.outputs]
        for node in chain:
            node.outputs.clear()
        # All are joined; where nobody reads the whole, that goes again.
        joined = [gs.Node("Concat", f"{t.name}/Concat", {"axis": 0}, self._pieces(t), [t]) for t in made]
        return [*split, *copies, *joined]

    def _part_of(self, node: gs.Node, part: int) -> gs.Node:
        inputs = [self._pieces(t)[part] if self._goes_with_rows(node, t) else t for t in node.inputs]
        if node.op == "Reshape":
            inputs[1] = self._shape_of_part(node.inputs[1])
        copy = node.copy(inputs, [self._pieces(t)[part] for t in node.outputs])
        copy.name = f"{node.name}.{part}"
        return copy

    def _pieces(self, tensor: gs.Tensor) -> list[gs.Variable]:
        pieces = [gs.Variable(f"{tensor.name}.{part}") for part in range(self.parts)]
        return self.pieces.setdefault(tensor.name, pieces)

    def _goes_with_rows(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        if tensor.name in self.rows:
            return True
        own, other = next(t for t in node.inputs if t.name in self.rows).shape, tensor.shape or []
        return node.op in ("Add", "Sum", "Mul") and len(other) == len(own) and other[0] == own[0]

    def _shape_of_part(self, shape: gs.Constant) -> gs.Constant:
        values, name = shape.values.copy(), f"{shape.name}.of_part"
        values[0] = values[0] // self.parts if values[0] > 0 else values[0]
        return self.tensors.setdefault(name, gs.Constant(name, values))
