"""Recorded inputs of the dense subgraphs, from real frames through the real stages: what quantization is fitted to.

On disk, in a bundle's calibration/recorded/: `<graph>/<input>.npy`, first axis the runs of that graph, and a manifest
with the frames in order and their hashes. Rows of features come from all frames in equal parts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import (
    MANIFEST,
    Bundle,
    file_entries,
    new_folder,
    read_manifest,
    sha256_of,
    verify_files,
    write_json,
)
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frames import Sample, find_samples, read_sample
from m3ad.preprocess import ModelInput, prepare
from m3ad_runtime.onnx_graph import Arrays
from m3ad_runtime.pipeline import model_arrays
from m3ad_runtime.stages import TiledHead

from m3ad_calibrate.walk import Walk, Walked

FORMAT = "m3ad-calibration"
FOLDER = "calibration/recorded"
DEFAULT_MEGABYTES = 256
MAX_FRAMES = 32  # ranges of activations stop moving long before
MOST_ROWS = 8192  # of a graph that works by rows
RECORDED_PIXELS = 1024  # of a frame, for what picks the scored rows out of a whole grid
TILED = "head_rows"
Feeds = list[dict[str, npt.NDArray[Any]]]
FrameFeeds = dict[tuple[str, str], list[npt.NDArray[Any]]]  # graph and input -> one array a use
Stacked = dict[str, npt.NDArray[Any]]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is recorded within a number of megabytes: whole frames for some graphs, rows for the others."""

    frames: int
    rows: int  # of each graph that works row by row
    tiles: int  # of head_rows


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Bytes of what goes into the graphs: of a frame, of a row of those that work by rows, of a tile of head_rows."""

    frame: int
    row: int
    tile: int


def budget(run: RunBytes, megabytes: int, available: int) -> Budget:
    """Share megabytes between frames and rows, half and half.

    Args:
        run: bytes of one.
        megabytes: of disk.
        available: frames there are.

    Raises:
        M3adError: they do not hold one frame and one tile.
    """
    half = megabytes * 1_000_000 // 2
    if half < run.frame + run.tile:
        needed = -(-2 * (run.frame + run.tile) // 1_000_000)
        raise M3adError(
            f"{megabytes} MB do not hold one frame and one tile of rows; ask for --megabytes {needed} or more"
        )
    tiles = max(1, half // 2 // run.tile) if run.tile else 0
    return Budget(
        frames=min(available, MAX_FRAMES, half // run.frame),
        rows=int(min(MOST_ROWS, (half - tiles * run.tile) // run.row)) if run.row else 0,
        tiles=int(tiles),
    )


def record(
    bundle: Bundle,
    data: Path,
    megabytes: int = DEFAULT_MEGABYTES,
    split: str = "train",
    say: Say = lambda _: None,
) -> Path:
    """Run good frames through the stages of a bundle and keep what goes into each dense subgraph.

    Args:
        bundle: not quantized.
        data: a category; good frames of `split`, evenly spread, in the split's order.
        megabytes: of disk, at most.
        split: train or validation; test frames are for the gate alone.
        say: is told of the frames.

    Returns:
        The folder written.

    Raises:
        FrameError: the split holds no good frames.
        M3adError: the budget is too small, or the split is not for calibration.
    """
    if split not in ("train", "validation"):
        raise M3adError(
            f"calibration frames come from train or validation, got {split!r}; test frames are the gate's"
        )
    samples = [s for s in find_samples(data, split) if s.is_good]
    if not samples:
        raise FrameError(f"{data} has no good frames in the split {split!r} to calibrate on")
    recorder = Recorder(bundle)
    preprocessing = bundle.preprocessing
    first = prepare(read_sample(samples[0], preprocessing.camera), preprocessing)
    shares = budget(recorder.run_bytes(first), megabytes, len(samples))
    chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, shares.frames).astype(int)]
    chosen = list(dict.fromkeys(chosen))  # distinct, in order
    rows, tile_rows = shares.rows // len(chosen), recorder.tile_rows * shares.tiles // len(chosen) + 1
    frames = []
    for i, sample in enumerate(chosen):
        frames.append(
            recorder.frame(prepare(read_sample(sample, preprocessing.camera), preprocessing), rows, tile_rows)
        )
        say(f"recorded {i + 1} of {len(chosen)}: {sample.split}/{sample.defect}/{sample.name}")
    feeds = stacked(frames, recorder.axes, recorder.tile_rows, shares.tiles)
    return write_record(bundle, feeds, chosen)


def recorded(
    source: Bundle, data: Path, say: Say = lambda _: None
) -> tuple[dict[str, Feeds], dict[str, Any]]:
    """The bundle's recorded inputs, recorded now from the training split if there are none, and where they are from."""
    manifest = source.path / FOLDER / MANIFEST
    if not manifest.exists():
        record(source, data, say=say)
    feeds = read_record(source)
    samples = [f"{s['split']}/{s['name']}" for s in json.loads(manifest.read_text())["samples"]]
    return feeds, {"record_sha256": sha256_of(manifest), "samples": samples}


class Recorder:
    """The stages of a bundle's layouts, run as far as their inputs are wanted."""

    def __init__(self, bundle: Bundle) -> None:
        folder, contract = bundle.path / "onnx", bundle.contract
        graphs = contract.method.graphs_of(bundle.manifest.layouts)
        self.axes = {g.name: g.axis for g in graphs if g.may_quantize and g.axis != "map"}
        self.walks = [Walk(contract, layout, folder) for layout in bundle.manifest.layouts]
        heads = [s for walk in self.walks for s in walk.stages.values() if isinstance(s, TiledHead)]
        rows = heads[0].rows if heads else None
        self.tile_rows = rows.tile_rows if rows else 0
        widths = [int(entry.shape[1]) for entry in rows.session.get_inputs()] if rows else []
        self.tile_bytes = 4 * self.tile_rows * sum(widths)

    def run_bytes(self, prepared: ModelInput) -> RunBytes:
        """What one run records, seen on a frame."""
        frame = self.frame(prepared, 1, 1)
        by_axis = {"frame": 0, "rows": 0}
        for (graph, _), values in frame.items():
            if graph != TILED:
                by_axis[self.axes[graph]] += sum(value.nbytes for value in values)
        return RunBytes(by_axis["frame"], by_axis["rows"], self.tile_bytes)

    def frame(self, prepared: ModelInput, rows: int, tile_rows: int) -> FrameFeeds:
        """Every graph's inputs of one frame, one entry a use; feature rows picked evenly over the part."""
        inputs = model_arrays(prepared)
        count = len(prepared.scored_pixel)
        feeds: FrameFeeds = {}
        known = Walked()
        for walk in self.walks:
            seen = {graph for graph, _ in feeds}
            is_tiled = isinstance(walk.stages[walk.last.stage], TiledHead)

            def tap(graph: str, arrays: Arrays, seen: set[str] = seen) -> None:
                if graph in self.axes and graph not in seen:
                    for name, value in arrays.items():
                        kept = _evenly(value, RECORDED_PIXELS) if name == "scored_pixel" else value
                        feeds.setdefault((graph, name), []).append(kept)

            pick = np.linspace(0, count - 1, min(tile_rows if is_tiled else rows, count)).astype(int)
            known = Walked(walk.run(inputs, pick, known, tap=tap).whole)
        return feeds


def _evenly(values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    picked: npt.NDArray[Any] = values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]
    return picked


def stacked(frames: Sequence[FrameFeeds], axes: Mapping[str, str], tile_rows: int, tiles: int) -> Stacked:
    """The frames' values as each graph's runs: `<graph>/<input>` -> [runs, ...].

    What runs once a frame has a run for each; what works by rows has one for each of its uses, rows of all frames
    together; head_rows one a tile, rows of all frames mixed.
    """
    feeds: Stacked = {}
    for graph, name in frames[0]:
        values = [frame[graph, name] for frame in frames]
        if graph == TILED:
            rows = np.concatenate([uses[0] for uses in values])
            chosen = np.linspace(0, len(rows) - 1, tiles * tile_rows).astype(int)
            stack = rows[chosen].reshape(tiles, tile_rows, -1)
        elif axes[graph] == "rows":
            stack = np.stack([np.concatenate(use) for use in zip(*values, strict=True)])
        else:
            stack = np.stack([uses[0] for uses in values])
        feeds[f"{graph}/{name}"] = stack
    return feeds


def write_record(bundle: Bundle, feeds: Stacked, samples: Sequence[Sample]) -> Path:
    """Write recorded inputs into the bundle, whole or not at all; an older record is replaced."""
    target = bundle.path / FOLDER
    with new_folder(target, FORMAT) as folder:
        for key, value in feeds.items():
            path = folder / f"{key}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, value, allow_pickle=False)
        manifest = {
            "format": FORMAT,
            "category": bundle.name,
            "onnx": onnx_hashes(bundle),
            "samples": [
                {
                    "split": s.split,
                    "name": f"{s.defect}/{s.name}",
                    "rgb_sha256": sha256_of(s.rgb_path),
                    "xyz_sha256": sha256_of(s.xyz_path),
                }
                for s in samples
            ],
            "files": file_entries(folder),
        }
        write_json(folder / "manifest.json", manifest)
    return target


def read_record(bundle: Bundle) -> dict[str, Feeds]:
    """The recorded runs of each graph, memory-mapped: graph -> inputs by name, one entry a run.

    Raises:
        ArtifactError: nothing was recorded, a file was changed, or the bundle's graphs are others by now.
    """
    folder = bundle.path / FOLDER
    advice = "Record again: m3ad-calibrate record"
    manifest = read_manifest(folder, FORMAT, advice)
    verify_files(folder, manifest["files"], advice)
    if manifest["onnx"] != onnx_hashes(bundle):
        raise ArtifactError(f"{folder} was recorded with other graphs than {bundle.path} holds now. {advice}")
    feeds: dict[str, Feeds] = {}
    for relative in manifest["files"]:
        graph, name = relative.removesuffix(".npy").split("/")
        values = np.load(folder / relative, mmap_mode="r", allow_pickle=False)
        runs = feeds.setdefault(graph, [{} for _ in values])
        for run, value in zip(runs, values, strict=True):
            run[name] = value
    return feeds


def onnx_hashes(bundle: Bundle) -> dict[str, str]:
    """The sha256 of every ONNX file a bundle lists."""
    return {k: v.sha256 for k, v in bundle.manifest.files.items() if k.startswith("onnx/")}
