"""The per-category files in which the authors of CFM and CMDR-IAD keep their heads: one file a network."""

from pathlib import Path

from m3ad.bundle import sha256_of
from m3ad.errors import ArtifactError
from torch import nn

from m3ad_export.checkpoints import State, load_strictly, read_checkpoint, tensors_of
from m3ad_export.weights import WeightsInfo


def official_file(folder: Path, category: str, pattern: str) -> Path:
    """The one file of a category that matches.

    Raises:
        ArtifactError: there is none, or several.
    """
    found = sorted((folder / category).glob(pattern))
    if len(found) != 1:
        raise ArtifactError(f"{folder / category} holds {len(found)} files {pattern}, expected one")
    return found[0]


def official_state(path: Path) -> State:
    """The state dict in a file.

    Raises:
        ArtifactError: it holds none.
    """
    return tensors_of(read_checkpoint(path), path)


def load_frozen(network: nn.Module, path: Path, licence: str, note: str = "") -> WeightsInfo:
    """Load a file into the network strictly; the network is then in eval mode and takes no gradient.

    Raises:
        ArtifactError: the file is not of this network; the message names the keys.
    """
    load_strictly(network, official_state(path), path)
    network.eval().requires_grad_(False)
    return WeightsInfo(name=path.name, kind="pretrained", sha256=sha256_of(path), licence=licence, note=note)
