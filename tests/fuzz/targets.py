"""What is fuzzed: a target makes one case from a generator and tries it; it fails unless that is taken or refused.

A case is right when it is taken or refused by an M3adError (for tensors: a ValueError too, which becomes INVALID_ARG).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import seeds
from m3ad.bundle import FORMAT, Bundle, read_manifest, verify_files
from m3ad.camera import read_camera
from m3ad.contract import MAX_POINTS, MIN_POINTS, Dims, mismatch
from m3ad.engines import Engines
from m3ad.errors import ArtifactError, M3adError
from m3ad.frame_door import PLACE, PREPARE, door_stages
from m3ad.frame_settings import Preprocessing
from m3ad.frames import read_frame
from m3ad.limits import Limits
from m3ad.methods import contract_of
from m3ad.regions import read_regions
from m3ad.rig import read_rig
from m3ad.serving import ServingRecord
from m3ad.signature import Signature
from m3ad.typed_json import parse_json, read_json, typed
from m3ad_client import report
from m3ad_client.saved import read_result
from m3ad_export import saved as detectors
from m3ad_export.graphs.plan import default_plan, read_plan
from m3ad_triton.frame_models import Prepare, moved
from m3ad_triton.manifest import RepositoryManifest
from m3ad_triton.repository import Repository, server_arguments
from mutate import damaged_bytes, damaged_json

Case = Callable[[Random], None]
FILES = ("pictures", "clouds")


def files(folder: Path, kind: str) -> Case:
    """Damaged pictures or clouds beside sound partners."""
    sound = getattr(seeds, kind)()
    seeds.write(folder)
    names = list(sound)

    def case(rng: Random) -> None:
        name = rng.choice(names)
        path = folder / f"damaged{Path(name).suffix}"
        path.write_bytes(damaged_bytes(rng, sound[name], sound[rng.choice(names)]))
        pair = (path, folder / "sound.npy") if kind == "pictures" else (folder / "sound.png", path)
        try:
            frame = read_frame(*pair)
        finally:
            path.unlink()
        assert frame.rgb.shape == frame.xyz.shape

    return case


def documents(folder: Path, bundle: Bundle, repository: Path, saved: list[dict[str, Any]]) -> dict[str, Case]:
    """Damaged JSON of every kind that is read, by kind."""
    path = folder / "document.json"
    manifest = folder / "manifest.json"
    few = {**bundle.document, "files": dict(list(bundle.document["files"].items())[:2])}
    for name in few["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    record = ServingRecord.of(bundle, "fused")
    shown = json.loads((repository / "manifest.json").read_text())
    entry = next(iter(bundle.document["files"].values()))
    engines = {
        "format": "m3ad-engines",
        "target": "sm89",
        "compute_capability": "8.9",
        "runtime": "tensorrt",
        "runtime_version": "10.3",
        "precision": "fp16",
        "files": {"vm.plan": entry},
    }
    rig = {
        "format": "m3ad-rig",
        "plane": [0, 0, 1, -0.5],
        "distance_m": 0.5,
        "residual_m": 0.001,
        "offset_limit_m": 0.0025,
        "tilt_limit_deg": 0.5,
        "coverage": 0.9,
        "coverage_limit": 0.7,
        "frames": ["a"],
        "left_out": [],
    }
    signature = {
        "format": "m3ad-signature",
        "signed": {"manifest.json": "0" * 64},
        "public_key": "0" * 64,
        "signature": "0" * 128,
    }
    regions = {"width": 12, "height": 12, "include": [[[0, 0], [9, 0], [9, 9]]], "ignore": []}

    def bundle_of(_: Path) -> None:
        found = Bundle.of_document(folder, read_manifest(folder, FORMAT, "again"))
        found.verify_usable()
        ServingRecord.of(found, found.layout())

    def hashes_of(_: Path) -> None:
        verify_files(folder, read_manifest(folder, FORMAT, "again").get("files"), "again")

    def repository_of(_: Path) -> None:
        found = Repository(folder, RepositoryManifest.read(folder))
        server_arguments([found], ["place"])

    def engines_of(_: Path) -> None:
        found = Engines.open(folder, "again")
        _ = (found.target, found.compute_capability, found.precision, found.tensorrt_major, found.summary())

    def report_of(place: Path) -> None:
        found = read_result(place)
        for table in report.bench_tables([found]) if "rows" in found else report.eval_tables(found):
            table.to_markdown()

    def record_of(place: Path) -> None:
        found = ServingRecord.from_json(place.read_bytes(), "record", "again")
        Preprocessing.from_json(found.preprocessing)
        _ = found.contract.inputs

    def signature_of(place: Path) -> None:
        typed(read_json(place, "again"), Signature, "signature", "again")

    def parameters_of(place: Path) -> None:
        parameters = parse_json(place.read_bytes(), "request", "again")
        if isinstance(parameters, dict):
            moved(Limits(0.5), parameters)

    kinds: dict[str, tuple[Any, Callable[[Path], object]]] = {
        "bundle manifest": (bundle.document, bundle_of),
        "file list": (few, hashes_of),
        "repository manifest": (shown, repository_of),
        "engine manifest": (engines, engines_of),
        "serving record": (asdict(record), record_of),
        "rig": (rig, read_rig),
        "plan": (default_plan("int8").to_json(), read_plan),
        "camera": (seeds.CAMERA, read_camera),
        "regions": (regions, lambda place: read_regions([], [], place)),
        "signature": (signature, signature_of),
        "request parameters": ({"threshold": 0.5, "review": "0.25"}, parameters_of),
        **{f"saved result {n}": (each, report_of) for n, each in enumerate(saved)},
    }

    def case_of(document: Any, read: Callable[[Path], object]) -> Case:
        def case(rng: Random) -> None:
            content = damaged_json(rng, document)
            path.write_bytes(content)
            manifest.write_bytes(content)
            read(path)

        return case

    return {kind: case_of(*each) for kind, each in kinds.items()}


def detector(folder: Path, record: dict[str, Any]) -> Case:
    """Damaged `detector.json` whose networks are built but get no weights."""

    def case(rng: Random) -> None:
        (folder / "detector.json").write_bytes(damaged_json(rng, record))
        with _no_weights():
            detectors.load_detector(folder)

    return case


@contextmanager
def _no_weights() -> Iterator[None]:
    read = detectors.read_checkpoint

    def stop(_: Path) -> dict[str, Any]:
        raise ArtifactError("no weights here")

    detectors.read_checkpoint = stop
    try:
        yield
    finally:
        detectors.read_checkpoint = read


def requests() -> Case:
    """Tensors that a client sends, with the damage of the issue; what is taken must be what the contract says."""
    contract = contract_of("mentor3ad", Dims(), "all")
    image = np.zeros((1, 3, 224, 224), np.float32)

    def case(rng: Random) -> None:
        count = rng.choice((MIN_POINTS, MIN_POINTS + 1, 2000))
        numbers = np.random.default_rng(rng.randrange(1 << 30))
        pixel = np.sort(numbers.choice(MAX_POINTS, count, replace=False)).astype(np.int32)
        arrays: dict[str, np.ndarray] = {
            "image": image,
            "points": numbers.random((count, 3), np.float32),
            "point_pixel": pixel,
            "scored_pixel": pixel,
        }
        for _ in range(rng.choice((0, 1, 1, 2))):
            _damage_tensor(rng, arrays)
        wrong = mismatch(contract.inputs, arrays)
        assert (wrong is None) is _is_sound(arrays), wrong

    return case


def _damage_tensor(rng: Random, arrays: dict[str, np.ndarray]) -> None:
    name = rng.choice(list(arrays)) if arrays else "image"
    array = arrays.get(name, np.zeros(1, np.float32))
    if array.size > 1 << 20:  # a huge one that no memory is behind
        return
    changed = array.copy()
    flat = changed.reshape(-1)
    kind = rng.randrange(12)
    at = rng.randrange(flat.size) if flat.size else 0
    if kind == 0:
        arrays.pop(name, None)
        return
    if kind == 1:
        changed = array.astype(
            rng.choice(("float64", "float16", "int32", "int64", "uint8", "bool", "complex64", "object"))
        )
    elif kind == 2 and flat.size and changed.dtype.kind == "f":
        flat[at] = rng.choice((np.nan, np.inf, -np.inf))
    elif kind == 3 and flat.size and changed.dtype.kind in "if":
        flat[at] = rng.choice((-1, -(2**31), 2**31 - 1, MAX_POINTS, MAX_POINTS - 1))
    elif kind == 4 and flat.size:
        flat[at] = flat[rng.randrange(flat.size)]
    elif kind == 5 and changed.ndim:
        changed = changed[::-1]
    elif kind == 6 and changed.ndim:
        changed = changed[np.random.default_rng(rng.randrange(99)).permutation(len(changed))]
    elif kind == 7:
        changed = np.zeros((), array.dtype)
    elif kind == 8:
        changed = changed[None] if rng.random() < 0.5 else changed[..., None]
    elif kind == 9 and changed.ndim:
        changed = changed[: rng.choice((0, 1, MIN_POINTS - 1))]
    elif kind == 10:  # huge, and no byte of it in memory
        shape = rng.choice(((2**40,), (2**31, 3), (1, 3, 2**20, 2**20), (MAX_POINTS + 1, 3)))
        changed = np.broadcast_to(np.zeros((), array.dtype), shape)
    elif changed.ndim:
        changed = np.concatenate([changed, changed[-1:]])
    arrays[name] = changed


def _is_sound(arrays: dict[str, np.ndarray]) -> bool:
    """The contract's rule for Mentor3AD's inputs, said again with sets and sorting."""
    if arrays.keys() != {"image", "points", "point_pixel", "scored_pixel"}:
        return False
    image, points = arrays["image"], arrays["points"]
    if image.shape != (1, 3, 224, 224) or points.ndim != 2 or points.shape[1] != 3:
        return False
    if {image.dtype.name, points.dtype.name} != {"float32"} or not MIN_POINTS <= len(points) <= MAX_POINTS:
        return False
    if not np.isfinite(image.sum(dtype=np.float64)) or not np.isfinite(points.sum(dtype=np.float64)):
        return False
    for name, count in (("point_pixel", len(points)), ("scored_pixel", None)):
        pixel = arrays[name]
        if pixel.dtype != np.int32 or pixel.ndim != 1 or not 1 <= len(pixel) <= MAX_POINTS:
            return False
        listed = pixel.tolist()
        if listed != sorted(set(listed)) or listed[0] < 0 or listed[-1] >= MAX_POINTS:
            return False
        if count is not None and len(listed) != count:
            return False
    return True


def frames(bundle: Bundle) -> Case:
    """Frames that a client sends to the door: odd sizes, values and holes; what is taken becomes sound tensors."""
    door = Prepare.__new__(Prepare)
    door.record = ServingRecord.of(bundle, "fused")
    door.stages = door_stages(bundle.contract)
    settings = [
        Preprocessing(),
        Preprocessing(plane="ransac"),
        Preprocessing(plane="ransac", largest_component=False, lattice=3),
        Preprocessing(hole=-9999.0, zero_rule="any_coordinate"),
        Preprocessing(plane="fixed", plane_coefficients=(0.0, 0.0, 1.0, -0.5), without="rgb"),
        Preprocessing(without="xyz", extent_m=0.1),
    ]

    def case(rng: Random) -> None:
        door.preprocessing = rng.choice(settings)
        numbers = np.random.default_rng(rng.randrange(1 << 30))
        height, width = rng.choice(
            ((40, 40), (40, 40), (48, 40), (37, 51), (1, 1), (1, 2000), (2000, 1), (0, 3), (240, 8))
        )
        rgb = numbers.integers(0, 256, (height, width, 3)).astype(np.uint8)
        y, x = np.mgrid[:height, :width] * 1e-3
        xyz = np.stack([x, y, 0.4 + 0.01 * np.sin(50 * x)], -1).astype(np.float32)
        for _ in range(rng.choice((0, 1, 2, 3))):
            value = rng.choice((np.nan, np.inf, 0, -9999, 1e38, -3e38, 1e-42, 65.535, 0.5))
            rows = slice(rng.randrange(height + 1), rng.randrange(height + 1))
            chosen = (
                (rows, slice(None))
                if rng.random() < 0.7
                else (numbers.random((height, width)) < rng.random(),)
            )
            xyz[(*chosen, ..., rng.choice((slice(None), 0, 2)))] = value
        if rng.random() < 0.1:
            xyz *= np.float32(rng.choice((1000, 1e-6, 0, -1)))
        arrays: dict[str, Any] = {"rgb": rgb, "xyz": xyz}
        if rng.random() < 0.2:
            name = rng.choice(list(arrays))
            arrays[name] = rng.choice(
                (arrays[name][..., :2], arrays[name].astype(np.float64), np.zeros(()), arrays[name][:-1])
            )
        arrays[PLACE.name] = np.zeros(1, PLACE.dtype)  # the gate's, no client's
        with np.errstate(all="ignore"):
            made = door.tensors(arrays)
        wrong = mismatch(door.stages[PREPARE].outputs, made)
        assert wrong is None, wrong
        assert mismatch(door.stages[PREPARE].inputs, arrays) is None

    return case


REFUSALS = (M3adError,)
REFUSALS_OF_TENSORS = (M3adError, ValueError)  # what `backend.answer` makes INVALID_ARG of
