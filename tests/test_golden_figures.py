"""Figures of the tiny Mentor3AD as they were written down: a change that means to change none of them proves it here.

What is exact on every machine (sampled indices, scored pixels, graphs, wiring) is compared exactly; long lists stand as
their SHA-256. Floats are compared to 1e-5: instruction sets differ in the last bits of fp32. Written anew, only when a
change is meant to change them, by

    M3AD_WRITE_GOLDEN=1 pytest tests/test_golden_figures.py
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from m3ad.bundle import Bundle
from m3ad.contract import LAYOUTS, OPS, Dims
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame
from m3ad.methods import contract_of
from m3ad.preprocess import ModelInput, prepare
from m3ad_export.detector import Detector
from m3ad_export.torch_stages import stage_functions
from m3ad_plugins import ops
from m3ad_runtime.pipeline import Inspector, Pipeline, model_arrays

GOLDEN = Path(__file__).parent / "golden" / "mentor3ad.json"
RELATIVE = 1e-5
PERCENTILES = (1, 50, 90, 99)
FRAMES = {"square": Preprocessing(), "on a plane": Preprocessing(plane="ransac")}


def sha256(value: Any) -> str:
    """The hash of an array's values in C order, of a text, or of anything that JSON can hold."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def prepared(name: str) -> ModelInput:
    """A seeded frame, prepared; made of integers and single roundings, so that every machine makes the same one."""
    rng = np.random.default_rng(list(FRAMES).index(name))
    height, width = {"square": (160, 160), "on a plane": (180, 230)}[name]
    v, u = np.indices((height, width))
    disc = (v - height // 2) ** 2 + (u - width // 2) ** 2 < (height * 2 // 5) ** 2
    micrometres = 400_000 + (u - width // 2) ** 2 // 8 + v * 20 + rng.integers(-150, 150, (height, width))
    if name == "on a plane":
        micrometres = 450_000 + v * 40 + rng.integers(-150, 150, (height, width)) - 30_000 * disc
    xyz = np.stack([(u - width // 2) * 500, (v - height // 2) * 500, micrometres], axis=-1) / 1e6
    xyz[rng.random((height, width)) < 0.03] = 0
    rgb = rng.integers(0, 256, (height // 10, width // 10, 3)).repeat(10, 0).repeat(10, 1)
    return prepare(Frame(rgb.astype(np.uint8), xyz.astype(np.float32), name), FRAMES[name])


def figures_of(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The norm of every float tensor of a run, and how its map is distributed."""
    anomaly_map = values["anomaly_map"].astype(np.float64)
    return {
        "score": float(values["score"][0]),
        "map mean": float(anomaly_map.mean()),
        "map percentiles": np.percentile(anomaly_map, PERCENTILES).tolist(),
        "norms": {
            name: float(np.linalg.norm(value.astype(np.float64)))
            for name, value in values.items()
            if value.dtype == np.float32
        },
    }


def frame_figures(name: str, detector: Detector, bundle: Bundle) -> dict[str, Any]:
    arrays, dims = model_arrays(prepared(name)), detector.dims
    points, point_pixel = arrays["points"], arrays["point_pixel"]
    idx, neighborhood, knn_idx = ops.point_group(points, dims.groups, dims.group_size, dims.min_norm_sq)
    rows = ops.interpolation_operator(points, point_pixel, points[idx], arrays["scored_pixel"])
    exact = {
        **arrays,
        "idx": idx,
        "neighborhood": neighborhood,
        "knn_idx": knn_idx,
        "indptr": rows.indptr,
        "indices": rows.indices,
        "scored_pixel": rows.scored_pixel,
    }
    torch_chain = Pipeline(detector.contract.steps("chain"), stage_functions(detector))
    runs = {"PyTorch chain": torch_chain}
    runs |= {f"CPU {each}": Inspector(bundle, each, threads=1).pipeline for each in LAYOUTS}
    return {
        "shapes": {key: list(value.shape) for key, value in exact.items()},
        "sha256": {key: sha256(value) for key, value in exact.items()},
        "runs": {key: figures_of(run.run(arrays, keep_all=True)[0]) for key, run in runs.items()},
    }


def graph_figures(path: Path) -> dict[str, Any]:
    """What a graph is made of; node names, values and weights' names and shapes as one hash each."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    operations = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in graph.node)
    nodes = [[n.name, n.domain, n.op_type, [*n.input], [*n.output]] for n in graph.node]
    return {
        "inputs": [value.name for value in graph.input],
        "outputs": [value.name for value in graph.output],
        "opsets": {entry.domain: entry.version for entry in model.opset_import},
        "operations": dict(sorted(operations.items())),
        "functions": {f.name: sha256([n.op_type for n in f.node]) for f in model.functions},
        "nodes sha256": sha256(nodes),
        "initializers sha256": sha256([[i.name, [*i.dims], i.data_type] for i in graph.initializer]),
    }


def contract_figures() -> dict[str, Any]:
    """The table and the wiring for the sizes of the real networks."""
    contract = contract_of("mentor3ad", Dims())
    return {
        "inputs": [t.name for t in contract.inputs],
        "outputs": [t.name for t in contract.outputs],
        "stages sha256": {name: sha256(asdict(stage)) for name, stage in contract.stages.items()},
        "steps sha256": {each: sha256([asdict(s) for s in contract.steps(each)]) for each in LAYOUTS},
        "ops": {
            op.name: [
                *op.inputs,
                "->",
                *op.outputs,
                *(f"{n}: {t.__name__}" for n, t in op.attributes.items()),
            ]
            for op in OPS.values()
        },
    }


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def compare(section: str, found: dict[str, Any]) -> None:
    """Hold a section against the golden file, or write it there when that was asked for."""
    if os.environ.get("M3AD_WRITE_GOLDEN"):
        text = json.dumps({**golden(), section: found}, indent=1, sort_keys=True)
        GOLDEN.write_text(f"{text}\n", encoding="utf-8")
    assert differences(golden()[section], found) == []


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Each place at which two trees of figures differ, floats by more than RELATIVE."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        return [line for key in expected for line in differences(expected[key], found[key], f"{where}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{where}/{i}")]
    if isinstance(expected, float) and isinstance(found, float):
        same = found == pytest.approx(expected, rel=RELATIVE, abs=0)
    else:
        same = expected == found
    return [] if same else [f"{where}: {expected} before, {found} now"]


def test_a_difference_is_found_wherever_it_is() -> None:
    before = {"a": [1.0, 2], "b": {"c": "x"}}
    assert differences(before, {"a": [1.0 + 5e-6, 2], "b": {"c": "x"}}) == []
    assert len(differences(before, {"a": [1.0 + 2e-5, 3], "b": {"c": "y"}})) == 3
    assert len(differences(before, {"a": [1.0], "b": {"c": "x", "d": "x"}})) == 2


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str, tiny_detector: Detector, tiny_bundle: Bundle) -> None:
    compare(f"frame {name}", frame_figures(name, tiny_detector, tiny_bundle))


def test_bundle(tiny_bundle: Bundle) -> None:
    files = sorted(
        path.relative_to(tiny_bundle.path) for path in tiny_bundle.path.rglob("*") if path.is_file()
    )
    graphs = {path.name: graph_figures(tiny_bundle.path / path) for path in files if path.suffix == ".onnx"}
    compare("bundle", {"files": [str(path) for path in files], "graphs": graphs})


def test_contract() -> None:
    compare("contract", contract_figures())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_served_configurations(layout: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{layout}_repository")
    texts = {path.parent.name: path.read_text(encoding="utf-8") for path in root.glob("*/config.pbtxt")}
    compare(f"config.pbtxt {layout}", {name: sha256(text) for name, text in texts.items()})
