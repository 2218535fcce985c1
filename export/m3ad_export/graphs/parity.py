"""The same inputs through PyTorch and ONNX Runtime, compared at every stage boundary, for several sizes of cloud.

Two ONNX forms are held against PyTorch: the graphs with the custom ops' function bodies, which any ONNX runtime can
run, and the CPU stages, in which the ops are called between dense subgraphs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import IMAGE_SIZE, Layout
from m3ad.errors import ArtifactError
from m3ad.metrics import rank_correlation
from m3ad.preprocess import ModelInput
from m3ad.scored import Lattice, on_lattice, scored_pixels
from m3ad_runtime.onnx_graph import OnnxGraph
from m3ad_runtime.pipeline import Pipeline, model_arrays
from m3ad_runtime.stages import CheckedStage, StageFunction, cpu_stage

from m3ad_export.detector import Detector
from m3ad_export.torch_stages import stage_functions

PARITY_POINTS = (1024, 1025, 17000, 50176)
# Largest difference relative to the largest reference value, fp32 to fp32; indices must be equal.
STAGE_TOLERANCE = 1e-4
MAP_TOLERANCE = 1e-4
RANK_TOLERANCE = 0.9999
# Where a method chooses rows of a memory: the share of a value that other choices may change, and how much of the
# largest value. One cell of 28 x 28, upsampled and blurred, is a fortieth of a map.
CHOICE_SHARE, CHOICE_TOLERANCE = 0.1, 0.05
Values = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one value of one form is from PyTorch's."""

    form: str
    points: int
    stage: str  # whose output it is; its inputs are the form's own, so errors add up from stage to stage
    value: str
    max_error: float
    relative_error: float
    rank_correlation: float | None
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """The entry of the bundle's manifest."""
        return {field: getattr(self, field) for field in self.__slots__}

    def __str__(self) -> str:
        rank = "" if self.rank_correlation is None else f", rank correlation {self.rank_correlation:.6f}"
        verdict = "" if self.passed else "  FAILS"
        return (
            f"N={self.points:<6} {self.form:<10} {self.stage:<14} {self.value:<22} "
            f"max error {self.max_error:.1e}{rank}{verdict}"
        )


def parity_inputs(points: int, image: npt.NDArray[np.float32], lattice: Lattice = "all") -> Values:
    """A frame with exactly this many foreground points: the pixels nearest to the image's centre, gently curved.

    Args:
        points: N, 1024..50176.
        image: [1, 3, 224, 224] of a real frame.
        lattice: of the scored pixels.

    Returns:
        The pipeline's inputs by name; coordinates in metres around 0.4 m, as a structured-light sensor sees them.
    """
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    middle = (IMAGE_SIZE - 1) / 2
    order = np.argsort((y - middle) ** 2 + (x - middle) ** 2, axis=None, kind="stable")
    pixel = np.sort(order[:points]).astype(np.int32)
    rows, columns = np.divmod(pixel, IMAGE_SIZE)
    noise = np.random.default_rng(points).normal(scale=1e-4, size=points)
    relief = 0.003 * np.sin(rows / 9.0) * np.cos(columns / 13.0)
    cloud = np.stack([(columns - middle) * 5e-4, (rows - middle) * 5e-4, 0.4 + relief + noise], axis=1)
    prepared = ModelInput(image, cloud.astype(np.float32), pixel, on_lattice(scored_pixels(pixel), lattice))
    return model_arrays(prepared)


def check_parity(
    detector: Detector,
    onnx_folder: Path,
    image: npt.NDArray[np.float32],
    layouts: tuple[Layout, ...] = ("chain",),
    points: tuple[int, ...] = PARITY_POINTS,
    threads: int = 2,
    frame: Values | None = None,
) -> list[Deviation]:
    """Compare the value at every stage boundary, for every number of points.

    A method that sees the cloud as an image has one size, that of its images: a `frame` of all its inputs.

    Returns:
        One entry per form, size and value; see `verify_parity`.
    """
    contract = detector.contract
    reference = Pipeline(contract.steps("chain"), stage_functions(detector))
    table = contract.stages
    loaded: dict[str, dict[str, StageFunction]] = {}
    for layout in layouts:
        for name in dict.fromkeys(step.stage for step in contract.steps(layout)):
            graph = CheckedStage(table[name], OnnxGraph(onnx_folder / f"{name}.onnx", threads))
            loaded.setdefault("onnx", {})[name] = graph
            loaded.setdefault("cpu stages", {})[name] = cpu_stage(name, onnx_folder, contract, threads)
    deviations: list[Deviation] = []
    for count in points if frame is None else (image[0, 0].size,):
        inputs: Values = parity_inputs(count, image, contract.lattice) if frame is None else frame
        expected, _ = reference.run(inputs, keep_all=True)
        for layout in layouts:
            wiring = contract.steps(layout)
            for form, functions in loaded.items():
                actual, _ = Pipeline(wiring, functions).run(inputs, keep_all=True)
                deviations += [
                    _deviation(
                        f"{layout} {form}",
                        count,
                        step.stage,
                        value,
                        actual[value],
                        expected[value],
                        chooses=contract.method.chooses,
                    )
                    for step in wiring
                    for value in step.outputs.values()
                    if value in expected
                ]
    return deviations


def verify_parity(deviations: list[Deviation]) -> None:
    """Refuse an export that differs from PyTorch.

    Raises:
        ArtifactError: a value is beyond its tolerance.
    """
    failed = [d for d in deviations if not d.passed]
    if failed:
        listed = "\n".join(f"  {d}" for d in failed)
        raise ArtifactError(
            f"ONNX and PyTorch disagree in {len(failed)} of {len(deviations)} values (allowed: {STAGE_TOLERANCE:g} of "
            f"the largest value per stage, {MAP_TOLERANCE:g}, or that part of half a "
            f"largest value above 2, and rank correlation {RANK_TOLERANCE} for maps); "
            f"the bundle was not written:\n{listed}"
        )


def summary(deviations: list[Deviation]) -> dict[str, Any]:
    """The figures that go into the manifest."""
    maps = [d for d in deviations if d.value == "anomaly_map"]
    return {
        "points": sorted({d.points for d in deviations}),
        "anomaly_map_max_error": max(d.max_error for d in maps),
        "anomaly_map_rank_correlation": min(d.rank_correlation or 0.0 for d in maps),
        "values": [d.to_json() for d in deviations],
    }


def _deviation(
    form: str,
    points: int,
    stage: str,
    value: str,
    actual: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    *,
    chooses: bool = False,
) -> Deviation:
    if actual.shape != expected.shape:
        return Deviation(form, points, stage, value, float("inf"), float("inf"), None, False)
    error = float(np.abs(actual.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    relative = error / scale if scale else error
    rank = rank_correlation(actual.reshape(-1), expected.reshape(-1)) if value == "anomaly_map" else None
    if np.issubdtype(expected.dtype, np.integer):
        passed = error == 0
    elif value == "anomaly_map":
        # 1 - cos ends at 2, multiples of the expected have no upper bound where good parts never lay.
        passed = error <= MAP_TOLERANCE * max(1.0, scale / 2) and (rank or 0.0) >= RANK_TOLERANCE
    else:
        passed = relative <= STAGE_TOLERANCE
    if chooses and not passed and np.issubdtype(expected.dtype, np.floating):
        changed = np.mean(np.abs(actual.astype(np.float64) - expected) > STAGE_TOLERANCE * scale)
        passed = bool(changed <= CHOICE_SHARE and relative <= CHOICE_TOLERANCE)
    return Deviation(form, points, stage, value, error, relative, rank, passed)
