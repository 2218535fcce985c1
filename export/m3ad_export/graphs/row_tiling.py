"""The 3D encoder as a CPU runs it best: the mini-PointNet's rows in parts that stay in a cache from product to product.

A device wants few large launches, so its graph stays whole; both have the same nodes and weights.
"""

import math

import onnx
from onnx import helper, numpy_helper, shape_inference

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


def in_parts(encoder: onnx.ModelProto, parts: int = CPU_PARTS) -> onnx.ModelProto:
    """A copy of the plugin-free encoder that takes the rows from the first ReLU to each maximum of a group in parts.

    There are as many parts as divide both the groups and `parts`; with one, nothing changes.
    """
    inferred = shape_inference.infer_shapes(encoder).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.input)
    }
    parts = math.gcd(shapes["neighborhood"][0], parts)
    if parts == 1:
        return encoder
    start = next(node.output[0] for node in encoder.graph.node if node.op_type == "Relu")
    constants = {i.name for i in encoder.graph.initializer}
    rows, chained = {start}, set()
    for node in encoder.graph.node:
        # Quantized layers subtract a negated bias; the statistics subtract a mean.
        is_row_by_row = node.op_type in (*BETWEEN, LAST) or (
            node.op_type == "Sub" and node.input[1] in constants
        )
        if is_row_by_row and rows.intersection(node.input):
            chained.add(node.output[0])
            rows.update(node.output if node.op_type != LAST else ())
    result = onnx.ModelProto()
    result.CopyFrom(encoder)
    writer = _Writer(result.graph, shapes, rows, parts)
    del result.graph.node[:]
    for node in encoder.graph.node:
        writer.add(node, node.output[0] in chained)
    read = {name for node in result.graph.node for name in node.input}
    for unused in [i for i in result.graph.initializer if i.name not in read]:
        result.graph.initializer.remove(unused)
    return result


class _Writer:
    """Nodes in a new order: those of a chain part by part, as soon as another node wants their result."""

    def __init__(
        self, graph: onnx.GraphProto, shapes: dict[str, list[int]], rows: set[str], parts: int
    ) -> None:
        self.graph, self.shapes, self.rows, self.parts = graph, shapes, rows, parts
        self.constants = {i.name: i for i in graph.initializer}
        self.waiting: list[onnx.NodeProto] = []
        self.split: set[str] = set()  # values that exist as <name>.0, <name>.1, ...
        self.apart: set[str] = set()  # those that do not exist whole

    def add(self, node: onnx.NodeProto, is_chained: bool) -> None:
        """Take the next node of the whole graph."""
        if is_chained:
            self.waiting.append(node)
            return
        if any(name in node.input for each in self.waiting for name in each.output):
            self._write_waiting()
        for name in sorted(self.apart.intersection(node.input)):
            joined = helper.make_node("Concat", self._pieces(name), [name], name=f"{name}/Concat", axis=0)
            self.graph.node.append(joined)
            self.apart.remove(name)
        self.graph.node.append(node)

    def _write_waiting(self) -> None:
        for node in self.waiting:
            for name in dict.fromkeys(node.input):
                if self._goes_with_rows(node, name) and name not in self.split:
                    pieces = self._pieces(name)
                    split = helper.make_node(
                        "Split", [name], pieces, name=f"{name}/Split", axis=0, num_outputs=self.parts
                    )
                    self.graph.node.append(split)
                    self.split.add(name)
            self.split.update(node.output)
            self.apart.update(node.output)
        for part in range(self.parts):
            for node in self.waiting:
                self.graph.node.append(self._part_of(node, part))
        self.waiting.clear()

    def _pieces(self, name: str) -> list[str]:
        return [f"{name}.{part}" for part in range(self.parts)]

    def _goes_with_rows(self, node: onnx.NodeProto, name: str) -> bool:
        if name in self.rows or name in self.split:
            return True
        row = next(n for n in node.input if n in self.rows)
        own, other = self.shapes[row], self.shapes.get(name, [])
        return node.op_type in ("Add", "Sum", "Mul") and len(other) == len(own) and other[0] == own[0]

    def _part_of(self, node: onnx.NodeProto, part: int) -> onnx.NodeProto:
        result = onnx.NodeProto()
        result.CopyFrom(node)
        result.name = f"{node.name}.{part}"
        result.input[:] = [f"{n}.{part}" if self._goes_with_rows(node, n) else n for n in node.input]
        result.output[:] = [f"{n}.{part}" for n in node.output]
        if node.op_type == "Reshape":
            result.input[1] = self._shape_of_part(node.input[1])
        return result

    def _shape_of_part(self, name: str) -> str:
        of_part = f"{name}.of_part"
        if of_part not in self.constants:
            shape = numpy_helper.to_array(self.constants[name]).copy()
            shape[0] = shape[0] // self.parts if shape[0] > 0 else shape[0]
            self.constants[of_part] = numpy_helper.from_array(shape, of_part)
            self.graph.initializer.append(self.constants[of_part])
        return of_part
