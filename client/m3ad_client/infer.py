"""Inspect frames and keep what is worth keeping: score, verdict, overlay picture, raw map."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from m3ad.atomic import file_beside
from m3ad.defects import Defect
from m3ad.errors import FrameError
from m3ad.frame_settings import Preprocessing
from m3ad.frames import Frame, Sample, find_pairs, find_samples, is_category, read_sample
from m3ad.limits import Limits, Verdict
from m3ad.overlay import Inspected, overlay, save_png
from m3ad.preprocess import ModelInput
from m3ad.serving import ServingRecord
from m3ad_runtime.pipeline import Inspection
from PIL import Image


class AnyInspector(Protocol):
    """What inspects: `m3ad_runtime.pipeline.Inspector` in this process or `TritonInspector` on a server."""

    record: ServingRecord
    preprocessing: Preprocessing
    limits: Limits

    def inspect(self, frame: Frame, *, with_maps: bool = False) -> Inspection:
        """Preprocess and inspect one frame."""

    def inspect_prepared(self, prepared: ModelInput, *, with_maps: bool = False) -> Inspection:
        """Inspect tensors that are preprocessed already."""


@dataclass(frozen=True, slots=True)
class FrameResult:
    """One frame's answer, or why it has none (`error`), or why its files are not there (`not_saved`)."""

    frame: str
    score: float | None = None
    is_anomalous: bool | None = None
    verdict: Verdict | None = None
    defects: list[Defect] | None = None
    latency_ms: float | None = None
    overlay: str | None = None
    anomaly_map: str | None = None
    error: str | None = None
    not_saved: str | None = None


def find_inputs(paths: Sequence[Path], split: str) -> list[Sample]:
    """The frames that the command line names: RGB and XYZ of one, or a folder in any known layout.

    Raises:
        FrameError: there are none, a file lacks its partner, or files and folders are mixed.
    """
    if len(paths) == 2:
        if folders := [path for path in paths if path.is_dir()]:
            raise FrameError(
                f"{folders[0]} is a folder; expected RGB and XYZ of one frame, or one folder alone"
            )
        rgb_path, xyz_path = paths
        return [Sample(rgb_path, xyz_path, None, "", "", rgb_path.stem)]
    if len(paths) != 1:
        raise FrameError(f"expected RGB and XYZ of one frame or one folder, got {len(paths)} paths")
    (folder,) = paths
    if folder.is_file():
        raise FrameError(f"{folder} is one file; name its partner, too: RGB XYZ")
    return find_samples(folder, split) if is_category(folder) else find_pairs(folder)


def inspect_samples(
    inspector: AnyInspector, samples: Sequence[Sample], out: Path | None
) -> Iterator[FrameResult]:
    """Inspect one frame after the other; a frame that cannot be inspected does not stop the next.

    Args:
        inspector: in process or on a server.
        samples: where the frames lie.
        out: folder for `<name>.overlay.png` and `<name>.map.npy` ([224, 224] float32); nothing is written without.

    Raises:
        ServerError: the server is gone.
    """
    for sample in samples:
        name = f"{sample.defect}/{sample.name}".lstrip("/")
        started = time.perf_counter()
        try:
            frame = read_sample(sample, inspector.preprocessing.camera)
            result = inspector.inspect(frame)
        except FrameError as error:
            yield FrameResult(name, error=str(error))
            continue
        milliseconds = round((time.perf_counter() - started) * 1e3, 3)
        files: dict[str, Any] = {}
        if out is not None:
            stem = name.replace("/", "_")
            files = {"overlay": str(out / f"{stem}.overlay.png"), "anomaly_map": str(out / f"{stem}.map.npy")}
            try:
                save_png(picture(inspector, frame, result), Path(files["overlay"]))
                _save_npy(result.anomaly_map, Path(files["anomaly_map"]))
            except OSError as error:  # a verdict is told also where the disk is full
                files = {"not_saved": f"{out}: {error.strerror}"}
        defects = list(result.defects or ())
        yield FrameResult(
            name, result.score, result.is_anomalous, result.verdict, defects, milliseconds, **files
        )


def picture(inspector: AnyInspector, frame: Frame, result: Inspection) -> Image.Image:
    """The frame with what was found in it, held against the inspector's limits."""
    regions = inspector.preprocessing.regions
    shown = Inspected(
        frame,
        result.anomaly_map,
        result.score,
        defects=result.defects or (),
        kept=regions.mask() if regions else None,
        geometry=inspector.preprocessing.geometry,
    )
    return overlay(shown, inspector.limits)


def _save_npy(array: npt.NDArray[np.float32], path: Path) -> None:
    content = BytesIO()  # NumPy's own writer does not say why a file could not be written
    np.save(content, array, allow_pickle=False)
    with file_beside(path) as temporary:
        temporary.write_bytes(content.getbuffer())
