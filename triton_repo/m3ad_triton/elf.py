"""What a shared library asks of the machine that loads it, read from its bytes: nothing of it is loaded or run.

ELF of 64 bits, little endian: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
"""

import platform
import struct
import subprocess
import sys
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183}
SHARED_OBJECT, LOAD, DYNAMIC, NEEDED, STRTAB, STRSZ, END = 3, 1, 2, 1, 5, 10, 0
SEARCH_TIMEOUT_S = 60
# Libraries of the system alone are opened, by bare name and in a process of their own.
SEARCH = """
import ctypes, sys
for name in sys.argv[1:]:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        print(name, flush=True)
"""


def library_problem(path: Path) -> str | None:
    """Why the dynamic linker of this machine would not load a library, in a few words; None when nothing is seen.

    Its format, its machine and the libraries it needs are looked at. Versions of their symbols are not.
    """
    try:
        needed = needed_libraries(path.read_bytes())
    except (ValueError, struct.error, OSError) as error:
        return str(error) if isinstance(error, ValueError | OSError) else "its headers are damaged"
    if named := [name for name in needed if "/" in name]:
        return f"it needs {named[0]} by its path, expected names of libraries"
    if absent := absent_libraries(needed):
        return f"it needs {', '.join(absent)}, which is not on this machine"
    return None


def needed_libraries(data: bytes) -> list[str]:
    """The names of the libraries a shared library needs.

    Raises:
        ValueError: it is no shared library of this machine; the message says what it is instead.
        struct.error: its headers point outside the file.
    """
    if data[:4] != b"\x7fELF" or data[4:6] != b"\x02\x01":
        raise ValueError("it is no ELF library of 64 bits")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if kind != SHARED_OBJECT:
        raise ValueError(f"it is an ELF file of type {kind}, expected a shared library")
    expected = MACHINES.get(platform.machine())
    if expected is not None and machine != expected:
        names = {number: name for name, number in MACHINES.items()}
        raise ValueError(
            f"it was built for {names.get(machine, f'machine {machine}')}, this is {platform.machine()}"
        )
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [_unpack("<IIQQQQ", data, table + size * i) for i in range(count)]
    loads = [(address, offset, length) for k, _, offset, address, _, length in headers if k == LOAD]
    entries: list[tuple[int, int]] = []
    for kind, _, offset, _, _, length in headers:
        if kind == DYNAMIC:
            pairs = (_unpack("<QQ", data, offset + 16 * i) for i in range(length // 16))
            entries = [(tag, value) for tag, value in pairs]
    tags = [tag for tag, _ in entries]
    entries = entries[: tags.index(END)] if END in tags else entries
    values = dict(entries)
    needed = [value for tag, value in entries if tag == NEEDED]
    if not needed:
        return []
    address = values.get(STRTAB, 0)
    start = next((address - a + offset for a, offset, n in loads if a <= address < a + n), None)
    if start is None:
        raise ValueError("its string table lies outside the file")
    strings = data[start : start + values.get(STRSZ, 0)]
    return [strings[name : strings.index(b"\0", name)].decode("ascii") for name in needed]


def _unpack(layout: str, data: bytes, offset: int) -> tuple[int, ...]:
    if offset > len(data):  # 64 bits hold offsets that `struct` cannot count to
        raise struct.error("its headers point outside the file")
    return struct.unpack_from(layout, data, offset)


def absent_libraries(names: list[str]) -> list[str]:
    """Those of the named libraries that this machine's linker does not find."""
    if not names:
        return []
    done = subprocess.run(
        [sys.executable, "-I", "-c", SEARCH, *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SEARCH_TIMEOUT_S,
        check=False,
    )
    return done.stdout.split()
