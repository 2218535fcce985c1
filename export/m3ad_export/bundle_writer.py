"""Detector -> bundle: ONNX files, golden values, parity figures and the manifest, written at once or not at all."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from m3ad import bundle as artefact
from m3ad.contract import CONTRACT_VERSION, IMAGE_SIZE, Layout
from m3ad.preprocess import ModelInput
from m3ad.scored import Lattice, on_lattice, scored_pixels
from m3ad_runtime.pipeline import Pipeline, model_arrays

from m3ad_export.detector import Detector
from m3ad_export.graphs.export import write_graphs
from m3ad_export.graphs.head import CPU_TILE_ROWS, DEVICE_TILE_ROWS
from m3ad_export.graphs.parity import PARITY_POINTS, Deviation, check_parity, summary, verify_parity
from m3ad_export.methods import IMPLEMENTATIONS
from m3ad_export.torch_stages import stage_functions

Say = Callable[[str], None]
GOLDEN_POINTS = 1500


def write_bundle(
    detector: Detector,
    golden: ModelInput,
    path: Path,
    *,
    layouts: Sequence[Layout] = (),
    parity_points: tuple[int, ...] = PARITY_POINTS,
    say: Say = lambda _: None,
) -> list[Deviation]:
    """Export a detector to a bundle that passed parity.

    Args:
        detector: trained, in eval mode.
        golden: one good frame; its values at every stage boundary, for its central points, become golden files.
        path: the bundle's folder; an older bundle there is replaced.
        layouts: which to write; all that the method has if left out.
        parity_points: numbers of foreground points to check.
        say: is told of each step.

    Returns:
        Every deviation measured.

    Raises:
        ArtifactError: `path` is something else, or ONNX and PyTorch disagree; nothing is written then.
    """
    contract = detector.contract
    layouts = tuple(layouts) or tuple(contract.method.layouts)
    for layout in layouts:
        contract.steps(layout)  # says which layouts the method has
    with artefact.new_folder(path, artefact.FORMAT) as folder:
        onnx_folder = folder / "onnx"
        onnx_folder.mkdir()
        started = time.perf_counter()
        write_graphs(detector, layouts, onnx_folder)
        export_s = time.perf_counter() - started
        images = contract.method.geometry != "points"
        sizes = "" if images else f" for N in {', '.join(map(str, parity_points))}"
        say(f"ONNX written in {export_s:.1f} s; checking parity{sizes}")
        deviations = check_parity(
            detector,
            onnx_folder,
            golden.image,
            layouts,
            parity_points,
            frame=model_arrays(golden) if images else None,
        )
        verify_parity(deviations)
        write_golden(detector, golden, folder / "golden")
        manifest = {
            "format": artefact.FORMAT,
            "contract_version": CONTRACT_VERSION,
            "dims": detector.dims.to_json(),
            "layouts": list(layouts),
            "tile_rows": {"cpu": CPU_TILE_ROWS, "device": DEVICE_TILE_ROWS},
            "score_maps": list(IMPLEMENTATIONS[contract.method.name].score_maps(detector.record)),
            **detector.record,
            "export_s": round(export_s, 1),
            "parity": summary(deviations),
            "files": artefact.file_entries(folder),
        }
        artefact.write_json(folder / artefact.MANIFEST, manifest)
    return deviations


def write_golden(detector: Detector, frame: ModelInput, folder: Path) -> None:
    """Write PyTorch's value of every tensor of the chain for a part of one frame, as `<value>.npy`."""
    folder.mkdir()
    pipeline = Pipeline(detector.contract.steps("chain"), stage_functions(detector))
    values, _ = pipeline.run(model_arrays(central_part(frame, detector.contract.lattice)), keep_all=True)
    for name, value in values.items():
        np.save(folder / f"{name}.npy", value, allow_pickle=False)


def central_part(frame: ModelInput, lattice: Lattice = "all", points: int = GOLDEN_POINTS) -> ModelInput:
    """The foreground points nearest to the middle of the grid: a real frame whose feature rows stay a few megabytes.

    A frame whose cloud is seen as an image stays whole.
    """
    if frame.cloud[0] is not frame.points:
        return frame
    y, x = np.divmod(frame.point_pixel, IMAGE_SIZE)
    middle = (IMAGE_SIZE - 1) / 2
    kept = np.sort(np.argsort((y - middle) ** 2 + (x - middle) ** 2, kind="stable")[:points])
    pixel = frame.point_pixel[kept]
    return ModelInput(frame.image, frame.points[kept], pixel, on_lattice(scored_pixels(pixel), lattice))
