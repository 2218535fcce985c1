"""The library of the portable C++ ops, called through ctypes (which lets go of the GIL)."""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from m3ad.errors import M3adError

from m3ad_plugins import build

Form = TypeVar("Form", bound=Callable[..., Any])

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "f": ctypes.c_float, "d": ctypes.c_double}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library of these sources, built at first use; None after one warning that says what is slower."""
    wanted = (build.source_hash() or "").encode()  # a package without sources takes the library it came with
    paths = [path for path in build.library_paths() if path.is_file()]
    # The hash is read, not asked for: a stale library that was loaded once would keep its name.
    found = next((path for path in paths if wanted in path.read_bytes()), None)
    try:
        loaded = ctypes.CDLL(str(found or build.build()))
    except M3adError as error:
        warnings.warn(
            "m3ad's native ops are missing, so sampling, grouping, interpolation and histograms run in NumPy, 10 to "
            f"100 times slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return loaded


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(in_cpp: Form, in_numpy: Form) -> Form:
    """The form of an op that does the work in this process: C++ once it is built, NumPy without it."""
    return in_numpy if library() is None else in_cpp


def call(name: str, types: str, *arguments: Any) -> None:
    """Call an op of the library.

    Args:
        name: without its prefix.
        types: of the arguments, a letter each: p for an array (or None), i for int32, f and d for float32 and float64.
        arguments: in the order of the C++; arrays are checked and in C order.

    Raises:
        MemoryError: memory or threads ran out.
    """
    found = library()
    assert found is not None  # the NumPy form is chosen otherwise
    plain = (a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments)
    typed = [_TYPES[letter].from_param(value) for letter, value in zip(types, plain, strict=True)]
    if getattr(found, f"m3ad_{name}")(*typed) != 0:
        raise MemoryError(f"{name}: not enough memory or threads")
