"""Requests of Triton's Python backend: its tensors as arrays, and arrays or a sentence as its answer."""

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from m3ad.contract import Tensor
from m3ad.errors import FrameError

Arrays = dict[str, npt.NDArray[Any]]
# An item of this type is 16 bytes long, and 16 is also the number of its flags: see `_serialized`.
BLOCK = np.dtype([("bytes", "V16")])


def answer(request: Any, inputs: Iterable[Tensor], function: Callable[[Arrays], Mapping[str, Any]]) -> Any:
    """What the function makes of a request's tensors; a frame that it refuses gets a sentence and INVALID_ARG."""
    import triton_python_backend_utils as pb_utils  # exists only inside Triton

    # DLPack both ways: the stub may be built for NumPy 1, and then misreads the element size of NumPy 2 arrays.
    arrays = {
        tensor.name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, tensor.name))
        for tensor in inputs
    }
    try:
        results = function(arrays)
    except (FrameError, ValueError) as error:
        refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(error=refusal)
    return pb_utils.InferenceResponse([_tensor(name, array) for name, array in results.items()])


def cancelled() -> Any:
    """The answer to a request whose client has given it up; nobody reads it."""
    import triton_python_backend_utils as pb_utils

    told = pb_utils.TritonError("its client has given this request up", pb_utils.TritonError.CANCELLED)
    return pb_utils.InferenceResponse(error=told)


def _tensor(name: str, array: npt.NDArray[Any]) -> Any:
    import triton_python_backend_utils as pb_utils

    if array.dtype == object:
        if not _knows_numpy_2():
            pb_utils.serialize_byte_tensor = _serialized
        return pb_utils.Tensor(name, array)
    return pb_utils.Tensor.from_dlpack(name, _exportable(array))


def _exportable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy when it is not contiguous or not writable, which DLPack cannot carry."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


@cache
def _knows_numpy_2() -> bool:
    """Whether the stub that runs this model was built for NumPy 2; nvidia-pytriton's was not."""
    return b"numpy._core" in Path("/proc/self/exe").read_bytes()


def _serialized(texts: npt.NDArray[np.object_]) -> npt.NDArray[np.void]:
    """One text [1] of bytes as Triton sends it, length and bytes, blanks at its end up to whole blocks.

    A stub for NumPy 1 counts bytes as items times the item size, which it reads where NumPy 2 keeps the type's flags.
    Of BLOCK both are 16.
    """
    text: bytes = texts.item()
    blocks = -(-(len(text) + 4) // BLOCK.itemsize)
    text = text.ljust(blocks * BLOCK.itemsize - 4)
    return np.frombuffer(struct.pack("<I", len(text)) + text, BLOCK)
