"""PCD and PLY: headers and points, in NumPy.

Only x, y and z are read, of the first element, ascii or binary. The header is all that is read before it is known that
the cloud's own grid is the image's: a cloud that says it is unorganised must never be reshaped.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import numpy.typing as npt

from m3ad.decode import DAMAGED, MAX_BYTES, damaged, require_file

MAX_HEADER = 1 << 16
PLY_FORMS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
# How scanners note a grid in a PLY, which has no words of its own for it.
PLY_GRID = re.compile(r"(?:comment|obj_info)\s+(num_cols|num_rows|width|height)\W+(\d+)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CloudHeader:
    """What a cloud's file says of itself.

    Args:
        count: of points.
        grid: (H, W), where the file gives one; H is 1 for an unorganised PCD.
        form: of the body.
        record: x, y and z in one point's bytes.
        columns: x, y and z among one point's numbers, for ascii.
        start: where the body begins.
    """

    count: int
    grid: tuple[int, int] | None
    form: Literal["ascii", "binary", "binary_compressed"]
    record: np.dtype[np.void]
    columns: tuple[int, ...]
    start: int


def read_cloud_header(path: Path) -> CloudHeader:
    """Read the header of a PLY or PCD; raises FrameError when the file is missing or damaged."""
    require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(MAX_HEADER)
        return _ply(head) if path.suffix.lower() == ".ply" else _pcd(head)
    except DAMAGED as error:
        raise damaged(path, path.suffix[1:].upper(), error) from error


def read_cloud(path: Path, header: CloudHeader) -> npt.NDArray[np.floating]:
    """Read the points of a PLY or PCD in file order, holes included, [M, 3].

    Raises:
        FrameError: the file holds fewer points than its header says, or they are damaged.
    """
    points: npt.NDArray[np.floating]
    try:
        if header.form == "ascii":
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty body; its points are counted below
                file.seek(header.start)
                points = np.loadtxt(
                    file, usecols=header.columns, max_rows=header.count, comments=None, ndmin=2
                )
        elif header.form == "binary":
            records = np.memmap(path, header.record, "r", header.start, (header.count,))
            points = np.stack([records[axis] for axis in "xyz"], axis=1)
        else:
            points = _decompressed(path, header)
    except DAMAGED as error:
        raise damaged(path, path.suffix[1:].upper(), error) from error
    if len(points) != header.count:
        raise damaged(path, path.suffix[1:].upper(), f"it ends after {len(points)} of {header.count} points")
    return points


def _pcd(head: bytes) -> CloudHeader:
    said: dict[str, list[str]] = {}
    start = 0
    for line, start in _lines(head):  # noqa: B007  (where the last line ends, the body begins)
        key, *values = line.split() or ["#"]
        if not key.startswith("#"):
            said[key.upper()] = values
        if key.upper() == "DATA":
            break
    else:
        raise ValueError("its header has no line DATA")
    width, height = int(said["WIDTH"][0]), int(said["HEIGHT"][0])
    count = int(said.get("POINTS", [str(width * height)])[0])
    if count != width * height or count < 0:
        raise ValueError(f"its header gives {count} points but a grid of {width} x {height}")
    names = [name.lower() for name in said["FIELDS"]]
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(said["TYPE"], said["SIZE"], strict=True)]
    repeats = list(map(int, said.get("COUNT", ["1"] * len(names))))
    form = said["DATA"][0].lower()
    if form not in ("ascii", "binary", "binary_compressed"):
        raise ValueError(f"its DATA is {form!r}, expected ascii, binary or binary_compressed")
    record, columns = _record(names, kinds, repeats)
    return CloudHeader(count, (height, width), form, record, columns, start)  # type: ignore[arg-type]


def _ply(head: bytes) -> CloudHeader:
    lines = _lines(head)
    if next(lines, ("", 0))[0].strip() != "ply":
        raise ValueError("it does not begin with `ply`")
    form, element, count, start = "", "", 0, 0
    grid: dict[str, int] = {}
    properties: list[list[str]] = []
    for line, start in lines:  # noqa: B007
        key, *values = line.split() or ["comment"]
        if found := PLY_GRID.fullmatch(line):
            grid[{"num_cols": "width", "num_rows": "height"}.get(found[1].lower(), found[1].lower())] = int(
                found[2]
            )
        elif key == "format":
            form = values[0]
        elif key == "element":
            if not element and values[0] != "vertex":
                raise ValueError(f"its first element is {values[0]!r}, expected vertex")
            element, count = values[0], count if element else int(values[1])
        elif key == "property" and element == "vertex":
            properties.append(values)
        elif key == "end_header":
            break
    else:
        raise ValueError("its header has no line end_header")
    order = PLY_FORMS[form]
    if count < 0 or any(values[0] == "list" for values in properties):
        raise ValueError("its vertices are not plain numbers")
    record, columns = _record(
        [values[1] for values in properties],
        [order + PLY_TYPES[values[0]] for values in properties],
        [1] * len(properties),
    )
    shape = (grid["height"], grid["width"]) if len(grid) == 2 else None
    return CloudHeader(count, shape, "ascii" if form == "ascii" else "binary", record, columns, start)


def _lines(head: bytes) -> Iterator[tuple[str, int]]:
    """The lines of a header, and where the next one begins."""
    start = 0
    while (end := head.find(b"\n", start)) >= 0:
        yield head[start:end].decode("ascii", "replace").rstrip("\r"), end + 1
        start = end + 1


def _record(
    names: Sequence[str], kinds: Sequence[str], repeats: Sequence[int]
) -> tuple[np.dtype[np.void], tuple[int, ...]]:
    """x, y, z in the bytes of a point, and their columns among its numbers."""
    offset = column = 0
    places, formats, columns = {}, {}, {}
    for name, kind, repeat in zip(names, kinds, repeats, strict=True):
        places[name], formats[name], columns[name] = offset, np.dtype(kind), column
        offset += np.dtype(kind).itemsize * repeat
        column += repeat
    if not all(axis in formats and formats[axis].kind == "f" for axis in "xyz"):
        raise ValueError(f"its fields are {', '.join(map(repr, names))}, expected x, y and z as floats")
    shape = {
        "formats": [formats[a] for a in "xyz"],
        "offsets": [places[a] for a in "xyz"],
        "itemsize": offset,
    }
    return np.dtype({"names": list("xyz"), **shape}), tuple(columns[axis] for axis in "xyz")  # type: ignore[call-overload]


def _decompressed(path: Path, header: CloudHeader) -> npt.NDArray[np.floating]:
    """The body that PCL compresses with LZF: all of the first field, then all of the second."""
    with path.open("rb") as file:
        file.seek(header.start)
        packed, size = np.frombuffer(file.read(8), "<u4", 2).tolist()
        if size != header.count * header.record.itemsize or size > MAX_BYTES:
            raise ValueError(
                f"its body is of {size} bytes for {header.count} points, at most {MAX_BYTES} are read"
            )
        body = imagecodecs.lzf_decode(file.read(packed), out=size)
    assert header.record.fields is not None
    places = [header.record.fields[axis][:2] for axis in "xyz"]
    columns = [np.frombuffer(body, dtype, header.count, offset * header.count) for dtype, offset in places]
    return np.stack(columns, axis=1)
