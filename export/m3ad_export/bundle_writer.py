"""Detector -> bundle: ONNX files, golden values, parity figures and the manifest, written at once or not at all."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from m3ad import bundle as artefact
from m3ad.contract import CONTRACT_VERSION, IMAGE_SIZE, LAYOUTS, Layout, steps
from m3ad.pipeline import Pipeline, model_arrays
from m3ad.preprocess import ModelInput
from m3ad.scored import scored_pixels
from m3ad.stages import Ops

from m3ad_export.detector import Detector
from m3ad_export.graphs.export import write_chain
from m3ad_export.graphs.head import CPU_TILE_ROWS, DEVICE_TILE_ROWS, write_head
from m3ad_export.graphs.parity import PARITY_POINTS, Deviation, check_parity, summary, verify_parity
from m3ad_export.heads.voting import map_names

Say = Callable[[str], None]
GOLDEN_POINTS = 1500


def write_bundle(
    detector: Detector,
    golden: ModelInput,
    path: Path,
    ops: Ops,
    *,
    layouts: tuple[Layout, ...] = LAYOUTS,
    parity_points: tuple[int, ...] = PARITY_POINTS,
    say: Say = lambda _: None,
) -> list[Deviation]:
    """Export a detector to a bundle that passed parity.

    Args:
        detector: trained, in eval mode.
        golden: one good frame; its values at every stage wall, for its central points, become golden files.
        path: the bundle's folder; an older bundle there is replaced.
        ops: the custom ops.
        layouts: which layouts to write.
        parity_points: numbers of foreground points to check.
        say: is told of each step.

    Returns:
        Every deviation measured.

    Raises:
        ArtifactError: `path` is something else, or ONNX and PyTorch disagree; nothing is written then.
    """
    with artefact.new_folder(path, artefact.FORMAT) as folder:
        onnx_folder = folder / "onnx"
        onnx_folder.mkdir()
        started = time.perf_counter()
        write_chain(detector, onnx_folder)
        if "fused" in layouts:
            write_head(detector, onnx_folder)
        export_s = time.perf_counter() - started
        say(
            f"ONNX written in {export_s:.1f} s; checking parity for N in {', '.join(map(str, parity_points))}"
        )
        deviations = check_parity(detector, onnx_folder, ops, golden.image, layouts, parity_points)
        verify_parity(deviations)
        write_golden(detector, golden, folder / "golden", ops)
        manifest = {
            "format": artefact.FORMAT,
            "contract_version": CONTRACT_VERSION,
            "dims": detector.dims.to_json(),
            "layouts": list(layouts),
            "tile_rows": {"cpu": CPU_TILE_ROWS, "device": DEVICE_TILE_ROWS},
            "score_maps": list(map_names(detector.vm.config)),
            **detector.record,
            "export_s": round(export_s, 1),
            "parity": summary(deviations),
            "files": artefact.file_entries(folder),
        }
        artefact.write_json(folder / artefact.MANIFEST, manifest)
    return deviations


def write_golden(detector: Detector, frame: ModelInput, folder: Path, ops: Ops) -> None:
    """Write PyTorch's value of every tensor of the chain for a part of one frame, as `<value>.npy`."""
    folder.mkdir()
    pipeline = Pipeline(steps(detector.dims, "chain"), detector.stage_functions(ops))
    values, _ = pipeline.run(model_arrays(central_part(frame)), keep_all=True)
    for name, value in values.items():
        np.save(folder / f"{name}.npy", value, allow_pickle=False)


def central_part(frame: ModelInput, points: int = GOLDEN_POINTS) -> ModelInput:
    """The foreground points nearest to the middle of the grid: a real frame whose feature rows stay a few megabytes."""
    y, x = np.divmod(frame.point_pixel, IMAGE_SIZE)
    middle = (IMAGE_SIZE - 1) / 2
    kept = np.sort(np.argsort((y - middle) ** 2 + (x - middle) ** 2, kind="stable")[:points])
    pixel = frame.point_pixel[kept]
    return ModelInput(frame.image, frame.points[kept], pixel, scored_pixels(pixel))
