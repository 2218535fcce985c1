"""Every TensorRT name that m3ad uses exists in each version it supports.

`tensorrt_api.json` was read from the Python bindings of the versions it lists: what 10.3 to 11.4 have in common, and
what TensorRT-RTX has.
"""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
COMMON, RTX = API["tensorrt"], API["tensorrt_rtx"]
# What a variable of this name holds, wherever it is used.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "registry": "IPluginRegistry",
    "layer": "ILayer",
    "tensor": "ITensor",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
# Behind `target != "native"`: ahead of time, for a GPU that is not there. The last ones: runtime_cache.py, which other
# runtimes have no use for.
RTX_ALONE = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.NONE",
}
USERS = sorted(
    path
    for room in ("core", "export", "trt_plugins", "triton_repo", "client", "calibrate")
    for path in (ROOT / room).rglob("*.py")
    if {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)} & {"trt"}
    or 'import_module("tensorrt' in path.read_text()
    or "registry.get_creator" in path.read_text()
)


def names_used(source: str) -> set[str]:
    """`Class` and `Class.member` for all that is asked of the module `trt` and of variables that hold its objects."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        held = node.value
        if isinstance(held, ast.Attribute) and isinstance(held.value, ast.Name) and held.value.id == "self":
            held = ast.Name(held.attr.lstrip("_"))  # what an object keeps is called as what it was given
        if isinstance(held, ast.Name) and held.id == "trt" and not node.attr.startswith("__"):
            used.add(node.attr)
        elif isinstance(held, ast.Name) and held.id in CLASSES:
            used.add(f"{CLASSES[held.id]}.{node.attr}")
        elif isinstance(held, ast.Attribute) and isinstance(held.value, ast.Name) and held.value.id == "trt":
            used.add(f"{held.attr}.{node.attr}")
    return used


def absent(used: set[str], api: dict[str, list[str]]) -> set[str]:
    parts = ((name, *name.partition(".")[::2]) for name in used)
    return {
        name for name, owner, member in parts if owner not in api or (member and member not in api[owner])
    }


def test_the_files_that_speak_to_tensorrt_are_found() -> None:
    assert {
        "engine_builder.py",
        "engine_types.py",
        "library.py",
        "tensorrt_plan.py",
        "tensorrt_pipeline.py",
    } <= {path.name for path in USERS}
    used = set[str]().union(*(names_used(path.read_text()) for path in USERS))
    assert {
        "Builder",
        "LayerType.PLUGIN_V3",
        "IPluginRegistry.load_library",
        "IBuilderConfig.set_timing_cache",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.device_memory_size_v2",
        "ICudaEngine.create_execution_context",
        "IExecutionContext.execute_async_v3",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
    } <= used


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.stem)
def test_every_name_is_in_every_version(path: Path) -> None:
    used = names_used(path.read_text())
    assert absent(used - RTX_ALONE, COMMON) == set()
    assert absent(used, RTX) == set()


@pytest.mark.parametrize(
    "name",
    [
        "trt.BuilderFlag.FP16",
        "config.int8_calibrator",
        "self._engine.device_memory_size",
        "network.add_plugin_v2",
    ],
)
def test_a_name_of_some_versions_only_is_found(name: str) -> None:
    """The first three went with 11.0; TensorRT-RTX never had the last."""
    used = names_used(f"def build(trt, config, network):\n    {name}\n")
    assert {one.rpartition(".")[2] for one in absent(used, RTX if "network" in name else COMMON)} == {
        name.rpartition(".")[2]
    }
