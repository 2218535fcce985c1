"""A complete bundle whose networks are a few hand-written ONNX nodes: the wiring is the real one, the sizes tiny."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from m3ad.bundle import Bundle, file_entries, new_folder, write_json
from m3ad.contract import CONTRACT_VERSION, IMAGE_SIZE, Dims, Tensor, stages, steps
from m3ad.frames import Frame
from m3ad.pipeline import Pipeline, model_arrays
from m3ad.preprocess import Preprocessing, prepare
from m3ad.stages import cpu_stage
from m3ad_plugins import ops
from onnx import TensorProto, helper, numpy_helper

DIMS = Dims(rgb_tokens=16, rgb_width=6, groups=8, group_size=4, xyz_width=6, mentor_width=4, score_maps=2)
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def frame(seed: int = 0, size: int = 200, part: float = 0.8) -> Frame:
    """A bumpy plate that fills `part` of the frame's side, with a few holes in its cloud."""
    rng = np.random.default_rng(seed)
    edge = round(size * (1 - part) / 2)
    inside = slice(edge, size - edge)
    y, x = np.meshgrid(*[np.linspace(-0.1, 0.1, size)] * 2, indexing="ij")
    z = 0.5 + 0.002 * np.sin(40 * x + seed) + rng.normal(0, 1e-4, x.shape)
    xyz = np.zeros((size, size, 3), np.float32)
    xyz[inside, inside] = np.stack([x, y, z], axis=-1)[inside, inside]
    xyz[rng.random((size, size)) < 0.01] = np.nan
    return Frame(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), xyz, f"frame {seed}")


def write_bundle(target: Path, category: str = "plate") -> Path:
    """Write the bundle, its golden values included."""
    rng = np.random.default_rng(1)
    with new_folder(target) as folder:
        (folder / "onnx").mkdir()
        for name, nodes, inputs, outputs, weights in _graphs(rng):
            _save(folder / "onnx" / f"{name}.onnx", nodes, inputs, outputs, weights)
        (folder / "golden").mkdir()
        wiring = steps(DIMS, "chain")
        functions = {s.stage: cpu_stage(s.stage, folder / "onnx", DIMS, ops, 1) for s in wiring}
        golden = model_arrays(prepare(frame(), Preprocessing()))
        values, _ = Pipeline(wiring, functions).run(golden, keep_all=True)
        for name, array in values.items():
            np.save(folder / "golden" / f"{name}.npy", array)
        weights = {"kind": "random", "sha256": None, "licence": None, "note": "hand-written"}
        write_json(
            folder / "manifest.json",
            {
                "format": "m3ad-bundle",
                "contract_version": CONTRACT_VERSION,
                "category": category,
                "encoders": {m: {"name": f"{m}_handmade", "weights": weights} for m in ("rgb", "xyz")},
                "dims": DIMS.to_json(),
                "score_maps": ["rgb", "xyz"],
                "preprocessing": Preprocessing().to_json(),
                "threshold": {"value": float(values["score"][0]) * 1.5},
                "files": file_entries(folder),
            },
        )
    return Bundle.open(target).path


def _graphs(rng: np.random.Generator) -> list[tuple[str, list[Any], Any, Any, dict[str, Any]]]:
    """Each network as (file, nodes, inputs, outputs, weights)."""
    table = stages(DIMS)
    rgb, xyz, mentor = DIMS.rgb_width, DIMS.xyz_width, DIMS.mentor_width

    def normal(*shape: int) -> Any:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    node = helper.make_node
    side = IMAGE_SIZE // DIMS.rgb_side
    vm = []
    for i, (a, b) in enumerate((("rgb", "rgb"), ("xyz", "xyz"))):
        vm += [
            node("Sub", [f"{a}_features", f"{b}_reconstructed"], [f"d{i}"]),
            node("Mul", [f"d{i}", f"d{i}"], [f"q{i}"]),
            node("ReduceMean", [f"q{i}", "one"], [f"e{i}"], keepdims=0),
            node("ScatterND", ["zeros", "index", f"e{i}"], [f"flat{i}"]),
            node("Reshape", [f"flat{i}", "grid"], [f"map{i}"]),
        ]
    vm = [
        node("Unsqueeze", ["scored_pixel", "one"], ["narrow"]),
        node("Cast", ["narrow"], ["index"], to=TensorProto.INT64),
        *vm,
        node("Concat", ["map0", "map1"], ["score_maps"], axis=0),
        node("Sub", ["mentor", "mentor_reconstructed"], ["dm"]),
        node("Mul", ["dm", "dm"], ["qm"]),
        node("ReduceMean", ["qm"], ["shift"], keepdims=0),
        node("ReduceSum", ["score_maps", "zero"], ["sum"], keepdims=0),
        node("Add", ["sum", "shift"], ["anomaly_map"]),
        node("ReduceMax", ["anomaly_map"], ["top"], keepdims=0),
        node("Reshape", ["top", "one"], ["score"]),
    ]
    constants = {
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "zeros": np.zeros(IMAGE_SIZE**2, np.float32),
        "grid": np.array([1, IMAGE_SIZE, IMAGE_SIZE], np.int64),
    }
    groups = Tensor("neighborhood", (DIMS.groups, DIMS.group_size, 3)), Tensor("centers", (DIMS.groups, 3))
    return [
        (
            "rgb_extractor",
            [
                node("AveragePool", ["image"], ["pooled"], kernel_shape=[side, side], strides=[side, side]),
                node("Reshape", ["pooled", "shape"], ["flat"]),
                node("Transpose", ["flat"], ["rows"], perm=[1, 0]),
                node("MatMul", ["rows", "w"], ["rgb_tokens"]),
            ],
            table["rgb_extractor"].inputs,
            table["rgb_extractor"].outputs,
            {"shape": np.array([3, DIMS.rgb_tokens], np.int64), "w": normal(3, rgb)},
        ),
        (
            "xyz_encoder",
            [
                node("ReduceMax", ["neighborhood", "one"], ["far"], keepdims=0),
                node("Concat", ["far", "centers"], ["six"], axis=1),
                node("MatMul", ["six", "w"], ["xyz_tokens"]),
            ],
            groups,
            table["xyz_extractor"].outputs[1:],
            {"one": np.array([1], np.int64), "w": normal(6, xyz)},
        ),
        (
            "mfm",
            [
                node("Concat", ["rgb_features", "xyz_features"], ["both"], axis=1),
                node("MatMul", ["both", "w"], ["line"]),
                node("Tanh", ["line"], ["mentor"]),
            ],
            table["mfm"].inputs,
            table["mfm"].outputs,
            {"w": normal(rgb + xyz, mentor)},
        ),
        (
            "mgm",
            [
                node("MatMul", ["mentor", "wr"], ["r"]),
                node("MatMul", ["mentor", "wx"], ["x"]),
                node("Add", ["r", "rgb_features"], ["rgb_reconstructed"]),
                node("Add", ["x", "xyz_features"], ["xyz_reconstructed"]),
            ],
            table["mgm"].inputs,
            table["mgm"].outputs,
            {"wr": normal(mentor, rgb), "wx": normal(mentor, xyz)},
        ),
        ("vm", vm, table["vm"].inputs, table["vm"].outputs, constants),
    ]


def _save(path: Path, nodes: Any, inputs: Any, outputs: Any, weights: dict[str, Any]) -> None:
    def info(tensor: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, TYPES[tensor.dtype], list(tensor.dims))

    graph = helper.make_graph(
        nodes,
        path.stem,
        [info(t) for t in inputs],
        [info(t) for t in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    if path.stem == "xyz_encoder":
        onnx.save_model(
            model, path, save_as_external_data=True, location="xyz_encoder.weights", size_threshold=64
        )
    else:
        onnx.save_model(model, path)
