"""Plugins of the contract's ops in Python, for parsers and builders: shapes and types, nothing to run.

They stand for `libm3ad_plugins.so` where TensorRT's headers, which it is built from, are not at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from m3ad.contract import OP_DOMAIN, OPS, Op


def shapes(
    trt: ModuleType, op: str, inputs: list[Any], attributes: dict[str, Any], constant: Any
) -> list[Any]:
    """The outputs' shapes, as trt_plugins/README.md lists them."""
    rows = {
        "FarthestPointSample": lambda: [[constant(attributes["num_samples"])]],
        "KnnGroup": lambda: [
            [inputs[1][0], constant(attributes["group_size"]), constant(3)],
            [inputs[1][0], constant(attributes["group_size"])],
        ],
        "TokenInterpolate": lambda: [[inputs[4][0], inputs[3][1]]],
        "OneClassSvm": lambda: [[inputs[0][0]]],
    }[op]()
    return [trt.DimsExprs(dims) for dims in rows]


@contextmanager
def registered(trt: ModuleType) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Put them into a registry; yields what was created, an op and its attributes each."""
    created: list[tuple[str, dict[str, Any]]] = []
    field = trt.PluginFieldType
    kinds = {int: field.INT32, float: field.FLOAT32, str: field.CHAR}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
            for base in (trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime, trt.IPluginV3):
                base.__init__(self)
            self.op, self.attributes = op, attributes
            self.plugin_name, self.plugin_version = op.name, str(op.version)
            self.plugin_namespace, self.num_outputs = OP_DOMAIN, len(op.outputs)

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op, self.attributes)

        def get_output_data_types(self, types: list[Any]) -> list[Any]:
            by_name = {"idx": trt.int32, "knn_idx": trt.int32, "rows": types[min(3, len(types) - 1)]}
            return [by_name.get(name, trt.float32) for name in self.op.outputs]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], builder: Any) -> list[Any]:
            return shapes(trt, self.op.name, inputs, self.attributes, builder.constant)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None: ...

        def supports_format_combination(self, at: int, tensors: Any, num_inputs: int) -> bool:
            return bool(tensors[at].desc.format == trt.TensorFormat.LINEAR)

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None: ...

        def on_shape_change(self, inputs: Any, outputs: Any) -> None: ...

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(self, *arguments: Any) -> None:
            raise AssertionError("a stand-in does not run")

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: Op) -> None:
            super().__init__()
            self.op, self.name = op, op.name
            self.plugin_version, self.plugin_namespace = str(op.version), OP_DOMAIN
            fields = [trt.PluginField(n, np.array([]), kinds[kind]) for n, kind in op.attributes.items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            read = {
                f.name: bytes(f.data).decode() if f.type == field.CHAR else np.asarray(f.data).item()
                for f in fields
            }
            created.append((self.op.name, read))
            return Plugin(self.op, read)

    registry = trt.get_plugin_registry()
    creators = [Creator(op) for op in OPS.values()]
    try:
        for creator in creators:
            assert registry.register_creator(creator, OP_DOMAIN)
        yield created
    finally:
        for creator in creators:
            registry.deregister_creator(creator)
