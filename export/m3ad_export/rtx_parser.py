"""What TensorRT-RTX's ONNX parser needs before it may meet a plugin.

Its parser opens `libtensorrt_rtx.so` when it adds one and ends the process when that fails; the wheel has
`libtensorrt_rtx.so.1` alone. A library of the wanted name that needs the wheel's, loaded first, is found instead: the
dynamic linker knows loaded libraries by their name. The installed wheel stays as it is.
"""

import ctypes
import importlib.util
import platform
import struct
import tempfile
from functools import lru_cache
from pathlib import Path

from m3ad.errors import MissingDependencyError

WANTED = "libtensorrt_rtx.so"
MACHINES = {"x86_64": 62, "aarch64": 183}
HEADER, SEGMENT, SYMBOL = 64, 56, 24


@lru_cache(maxsize=1)
def provide_library() -> None:
    """Load the forwarder, once in a process.

    Raises:
        MissingDependencyError: the wheel's library is not where its wheel has it, or is not of this machine.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for folder in folders for path in folder.glob(f"{WANTED}.*"))
    machine = MACHINES.get(platform.machine())
    if not found or machine is None:
        raise MissingDependencyError(
            f"{WANTED}.* of TensorRT-RTX is not installed for {platform.machine()}: pip install 'm3ad[rtx]'"
        )
    ctypes.CDLL(str(found[-1]), ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WANTED
        path.write_bytes(forwarder(WANTED, found[-1].name, machine))
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # stays mapped when the file is gone


def forwarder(name: str, needed: str, machine: int) -> bytes:
    """A shared library called `name` that holds nothing and needs the library `needed`.

    ELF of 64 bits, little endian: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    segments = 3
    at_symbols = HEADER + segments * SEGMENT
    at_hash = at_symbols + SYMBOL
    at_strings = at_hash + 16
    at_dynamic = -(-(at_strings + len(strings)) // 8) * 8
    needs, is_called, string_table, symbol_table, hash_table, string_bytes, symbol_bytes = (
        1,
        14,
        5,
        6,
        4,
        10,
        11,
    )
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (needs, len(name) + 2),
            (is_called, 1),
            (hash_table, at_hash),
            (string_table, at_strings),
            (symbol_table, at_symbols),
            (string_bytes, len(strings)),
            (symbol_bytes, SYMBOL),
            (0, 0),
        )
    )
    size = at_dynamic + len(dynamic)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    shared_object = 3
    sizes = (HEADER, SEGMENT, segments, 64, 0, 0)
    header = identity + struct.pack("<HHIQQQIHHHHHH", shared_object, machine, 1, 0, HEADER, 0, 0, *sizes)
    load, dynamic_segment, stack, readable_writable = 1, 2, 0x6474E551, 6
    table = [
        (
            load,
            readable_writable,
            0,
            0,
            0,
            size,
            size,
            0x10000,
        ),  # the linker writes addresses into the dynamic part
        (dynamic_segment, readable_writable, at_dynamic, at_dynamic, 0, len(dynamic), len(dynamic), 8),
        (stack, readable_writable, 0, 0, 0, 0, 0, 16),  # or it would be taken to want an executable one
    ]
    body = header + b"".join(struct.pack("<IIQQQQQQ", *row) for row in table)
    body += bytes(SYMBOL) + struct.pack("<IIII", 1, 1, 0, 0) + strings
    return body.ljust(at_dynamic, b"\0") + dynamic
