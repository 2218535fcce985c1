"""Recorded inputs of the plugin-free graphs, from real frames through the real stages: what quantization is fitted to.

On disk, in a bundle's calibration/recorded/: `<graph>/<input>.npy`, first axis the runs of that graph, and a manifest
with the frames in order and their hashes. Rows of features come from all frames in equal parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import (
    Bundle,
    file_entries,
    new_folder,
    read_manifest,
    sha256_of,
    verify_files,
    write_json,
)
from m3ad.contract import Dims
from m3ad.errors import ArtifactError, FrameError, M3adError
from m3ad.frames import Sample, find_samples, read_sample
from m3ad.onnx_graph import OnnxGraph
from m3ad.pipeline import model_arrays
from m3ad.preprocess import ModelInput, prepare
from m3ad.stages import Ops, by_modality, operators

FORMAT = "m3ad-calibration"
FOLDER = "calibration/recorded"
DEFAULT_MEGABYTES = 256
MAX_FRAMES = 32  # ranges of activations stop moving long before
Arrays = dict[str, npt.NDArray[Any]]
Feeds = list[Arrays]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is recorded within a number of megabytes: whole frames for the encoders, rows for the heads."""

    frames: int
    rows: int  # per chain graph
    tiles: int  # of head_rows


def budget(dims: Dims, tile: int, megabytes: int, available: int) -> Budget:
    """Share megabytes between frames and rows, half and half.

    Args:
        dims: the bundle's.
        tile: bytes of one run of head_rows, 0 without a fused layout.
        megabytes: of disk.
        available: frames there are.

    Raises:
        M3adError: they do not hold one frame and one tile.
    """
    frame = 4 * (3 * 224 * 224 + dims.groups * (dims.group_size * 3 + 3 + dims.xyz_width))
    frame += 4 * dims.rgb_tokens * dims.rgb_width
    half = megabytes * 1_000_000 // 2
    row = 4 * (3 * (dims.rgb_width + dims.xyz_width) + dims.mentor_width)  # mfm twice, mgm once
    if half < frame + tile:
        needed = -(-2 * (frame + tile) // 1_000_000)
        raise M3adError(
            f"{megabytes} MB do not hold one frame and one tile of rows; ask for --megabytes {needed} or more"
        )
    tiles = max(1, half // 2 // tile) if tile else 0
    return Budget(
        frames=min(available, MAX_FRAMES, half // frame),
        rows=int(min(8192, (half - tiles * tile) // row)),
        tiles=int(tiles),
    )


def record(
    bundle: Bundle,
    data: Path,
    ops: Ops,
    megabytes: int = DEFAULT_MEGABYTES,
    split: str = "train",
    say: Say = lambda _: None,
) -> Path:
    """Run good frames through the stages of a bundle and keep what goes into each plugin-free graph.

    Args:
        bundle: not quantized.
        data: a category; good frames of `split`, evenly spread, in the split's order.
        ops: the custom ops.
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
    recorder = Recorder(bundle, ops)
    shares = budget(bundle.dims, recorder.tile_bytes, megabytes, len(samples))
    chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, shares.frames).astype(int)]
    chosen = list(dict.fromkeys(chosen))  # distinct, in order
    preprocessing = bundle.preprocessing
    rows, tile_rows = shares.rows // len(chosen), recorder.tile_rows * shares.tiles // len(chosen) + 1
    frames = []
    for i, sample in enumerate(chosen):
        frames.append(recorder.frame(prepare(read_sample(sample), preprocessing), rows, tile_rows))
        say(f"recorded {i + 1} of {len(chosen)}: {sample.split}/{sample.defect}/{sample.name}")
    feeds = stacked(frames, recorder.tile_rows, shares.tiles)
    return write_record(bundle, feeds, chosen)


class Recorder:
    """The stages of a bundle, run as far as their inputs are wanted."""

    def __init__(self, bundle: Bundle, ops: Ops, threads: int = 2) -> None:
        self.dims: Dims = bundle.dims
        self.ops = ops
        layouts = bundle.manifest.layouts
        names = ["rgb_extractor", "xyz_encoder"]
        names += ["mfm", "mgm"] if "chain" in layouts else []
        names += ["head_tokens", "head_rows"] if "fused" in layouts else []
        # head_rows is not run, it only says how many rows a tile has.
        self.graphs = {name: OnnxGraph(bundle.file(f"onnx/{name}.onnx"), threads) for name in names}
        rows = self.graphs.get("head_rows")
        self.tile_rows = rows.tile_rows if rows else 0
        widths = [int(entry.shape[1]) for entry in rows.session.get_inputs()] if rows else []
        self.tile_bytes = 4 * self.tile_rows * sum(widths)

    def frame(self, prepared: ModelInput, rows: int, tile_rows: int) -> Arrays:
        """Every graph's inputs of one frame by `<graph>/<input>`, feature rows picked evenly over the part."""
        dims, ops = self.dims, self.ops
        idx, neighborhood, _ = ops.point_group(
            prepared.points, dims.groups, dims.group_size, dims.min_norm_sq
        )
        centers = prepared.points[idx]
        rgb_tokens = self.graphs["rgb_extractor"]({"image": prepared.image})["rgb_tokens"]
        grouped = {"neighborhood": neighborhood, "centers": centers}
        xyz_tokens = self.graphs["xyz_encoder"](grouped)["xyz_tokens"]
        values: Arrays = {"rgb_extractor/image": prepared.image}
        values |= {f"xyz_encoder/{name}": value for name, value in grouped.items()}
        rgb, xyz = operators({**model_arrays(prepared), "centers": centers}, dims.rgb_side, ops)
        count = len(prepared.scored_pixel)
        if "mfm" in self.graphs:
            pick = np.linspace(0, count - 1, min(rows, count)).astype(int)
            features = {
                "rgb_features": rgb.apply(rgb_tokens)[pick],
                "xyz_features": xyz.apply(xyz_tokens)[pick],
            }
            mentor = self.graphs["mfm"](features)
            again = self.graphs["mgm"]({**features, **mentor})
            values |= {f"mfm/{name}": value for name, value in features.items()}
            values |= {
                f"mfm again/{name}": again[name.replace("features", "reconstructed")] for name in features
            }
            values |= {f"mgm/{name}": value for name, value in {**features, **mentor}.items()}
        if "head_rows" in self.graphs:
            tokens = {"rgb_tokens": rgb_tokens, "xyz_tokens": xyz_tokens}
            tables = self.graphs["head_tokens"](tokens)
            rgb_tables, xyz_tables = by_modality({n: tables[n] for n in self.graphs["head_rows"].inputs})
            pick = np.linspace(0, count - 1, min(tile_rows, count)).astype(int)
            values |= {f"head_tokens/{name}": value for name, value in tokens.items()}
            values |= {f"head_rows/{name}": rgb.apply(table)[pick] for name, table in rgb_tables.items()}
            values |= {f"head_rows/{name}": xyz.apply(table)[pick] for name, table in xyz_tables.items()}
        return values


def stacked(frames: Sequence[Arrays], tile_rows: int, tiles: int) -> Arrays:
    """The frames' values as each graph's runs: `<graph>/<input>` -> [runs, ...].

    Encoders run once a frame; mfm and mgm once on all rows (mfm a second time on the reconstructed ones); head_rows
    once a tile, rows of all frames mixed.
    """
    feeds: Arrays = {}
    for key in frames[0]:
        graph = key.split("/")[0]
        if graph in ("mfm", "mgm"):
            feeds[key] = np.concatenate([f[key] for f in frames])[None]
        elif graph == "head_rows":
            rows = np.concatenate([f[key] for f in frames])
            wanted = np.linspace(0, len(rows) - 1, tiles * tile_rows).astype(int)
            feeds[key] = rows[wanted].reshape(tiles, tile_rows, -1)
        elif graph != "mfm again":
            feeds[key] = np.stack([f[key] for f in frames])
    for key in [k for k in frames[0] if k.startswith("mfm again/")]:
        first = key.replace("mfm again", "mfm")
        feeds[first] = np.concatenate([feeds[first], np.concatenate([f[key] for f in frames])[None]])
    return feeds


def write_record(bundle: Bundle, feeds: Arrays, samples: Sequence[Sample]) -> Path:
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
