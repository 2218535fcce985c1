"""A category's golden frame: its tensors and the bundle's own answer, kept beside the door for tensors.

Whoever asks a server for it sees whether that server still says what the bundle says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.bundle import Bundle
from m3ad.contract import Tensor
from m3ad.errors import ArtifactError
from m3ad.frame_door import tensor_door

from m3ad_triton.manifest import ADVICE, RepositoryManifest

FOLDER = "golden"  # Triton reads no folder of a model whose name is no number, warm-up aside
ANSWER = ("anomaly_map", "score")
# In fp32 a server may differ as parity allows it at export: this much, or half of it of a larger value than 2.
EXACT = 1e-4
REDUCED = 0.05  # of the largest value, where products are computed in fewer bits


@dataclass(frozen=True, slots=True)
class Golden:
    """What is asked of the model `door`, and what it has to answer.

    Attributes:
        inputs: the tensors of the frame.
        answer: anomaly_map and score.
        exact: whether products are computed in fp32.
    """

    door: str
    inputs: dict[str, npt.NDArray[Any]]
    answer: dict[str, npt.NDArray[Any]]
    exact: bool

    @classmethod
    def read(cls, repository: Path, manifest: RepositoryManifest) -> "Golden":
        """Read it from a repository that was verified.

        Raises:
            ArtifactError: the repository was written before it was kept, or a tensor is none of the contract's.
        """
        door = tensor_door(manifest.category)
        arrays = {}
        for tensor in (*manifest.contract.inputs, *_answers(manifest)):
            name = f"{door}/{FOLDER}/{tensor.name}.npy"
            if name not in manifest.files:
                raise ArtifactError(f"{repository} holds no golden frame ({name} is not listed). {ADVICE}")
            try:
                arrays[tensor.name] = np.load(repository / name, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ArtifactError(f"{repository / name} is no array. {ADVICE}") from error
            if problem := tensor.mismatch(arrays[tensor.name]):
                raise ArtifactError(f"{repository / name}: {problem}. {ADVICE}")
        inputs = {tensor.name: arrays[tensor.name] for tensor in manifest.contract.inputs}
        answer = {name: arrays[name] for name in ANSWER}
        return cls(door, inputs, answer, exact=manifest.precision == "fp32")

    def difference(self, values: Mapping[str, npt.NDArray[Any]]) -> str | None:
        """What differs between a server's answer and the bundle's, in a sentence; None when they agree."""
        for name, want in self.answer.items():
            got = values[name]
            if got.shape != want.shape:
                return f"`{name}` is {list(got.shape)}, the bundle's {list(want.shape)}"
            largest = float(np.abs(want).max())
            allowed = EXACT * max(1.0, largest / 2) if self.exact else REDUCED * largest
            worst = float(np.abs(got - want).max())
            if not worst <= allowed:  # NaN differs, too
                return f"`{name}` differs from the bundle's by {worst:.3g}, allowed is {allowed:.3g}"
        return None


def write_golden(bundle: Bundle, door: Path) -> None:
    """Copy a bundle's golden frame and answer below the folder of its door for tensors."""
    folder = door / FOLDER
    folder.mkdir()
    for tensor in (*bundle.contract.inputs, *bundle.contract.outputs):
        if tensor in bundle.contract.inputs or tensor.name in ANSWER:
            path = bundle.file(f"golden/{tensor.name}.npy")
            (folder / path.name).write_bytes(path.read_bytes())


def _answers(manifest: RepositoryManifest) -> list[Tensor]:
    return [tensor for tensor in manifest.contract.outputs if tensor.name in ANSWER]
