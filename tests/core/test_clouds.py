"""PCD and PLY in every spelling give the points that were written, on their own grid; anything else is refused."""

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m3ad.errors import FrameError
from m3ad.frames import read_frame
from PIL import Image

HEIGHT, WIDTH = 20, 30
RECORD = np.dtype([("x", "f4"), ("y", "f4"), ("z", "f4"), ("rgb", "u4"), ("normal", "f4", 3)])


@pytest.fixture
def rgb(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "part.png")
    return tmp_path / "part.png"


def cloud(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(HEIGHT, WIDTH, 3)).astype(np.float32)
    xyz[3, 4], xyz[5, 6], xyz[7, 8], xyz[7, 9] = 0, np.nan, np.inf, -np.inf
    return xyz


def records(xyz: np.ndarray, order: str = "<") -> np.ndarray:
    rng = np.random.default_rng(1)
    rows = np.zeros(xyz[..., 0].size, RECORD.newbyteorder(order))
    for axis, values in zip("xyz", xyz.reshape(-1, 3).T, strict=True):
        rows[axis] = values
    rows["rgb"], rows["normal"] = rng.integers(0, 1 << 24, len(rows)), rng.normal(size=(len(rows), 3))
    return rows


def text(rows: np.ndarray) -> bytes:
    lines = (
        " ".join(
            [
                *(repr(float(r[a])) for a in "xyz"),
                str(int(r["rgb"])),
                *(f"{float(n):.4g}" for n in r["normal"]),
            ]
        )
        for r in rows
    )
    return ("\n".join(lines) + "\n").encode()


def pcd(
    xyz: np.ndarray,
    form: str = "ascii",
    kind: str = "F",
    width: int = WIDTH,
    height: int = HEIGHT,
    end: str = "\n",
    points: bool = True,
) -> bytes:
    rows = records(xyz)
    head = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        "FIELDS x y z rgb normal",
        "SIZE 4 4 4 4 4",
        f"TYPE {kind} {kind} {kind} U {kind}",
        "COUNT 1 1 1 1 3",
        f"WIDTH {width}",
        f"HEIGHT {height}",
        "VIEWPOINT 0 0 0 1 0 0 0",
        *([f"POINTS {width * height}"] if points else []),
        f"DATA {form}",
    ]
    if form == "ascii":
        body = text(rows)
    elif form == "binary":
        body = rows.tobytes()
    else:
        fields = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in RECORD.names or ())
        packed = imagecodecs.lzf_encode(fields)
        body = struct.pack("<II", len(packed), len(fields)) + packed
    return "".join(f"{line}{end}" for line in head).encode() + body


def ply(
    xyz: np.ndarray, form: str = "ascii", notes: tuple[str, ...] = (), count: int = HEIGHT * WIDTH
) -> bytes:
    order = ">" if form == "binary_big_endian" else "<"
    head = [
        "ply",
        f"format {form} 1.0",
        *notes,
        f"element vertex {count}",
        *(f"property {kind} {axis}" for kind, axis in zip(("float", "float32", "float"), "xyz", strict=True)),
        "property uint rgb",
        *(f"property float n{axis}" for axis in "xyz"),
        "element face 0",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    rows = records(xyz, order)
    return "".join(f"{line}\n" for line in head).encode() + (
        text(rows) if form == "ascii" else rows.tobytes()
    )


SPELLINGS = {
    "ascii.pcd": pcd(cloud()),
    "binary.pcd": pcd(cloud(), "binary"),
    "binary_compressed.pcd": pcd(cloud(), "binary_compressed"),
    "lower-case.pcd": pcd(cloud(), kind="f"),
    "lower-case-binary.pcd": pcd(cloud(), "binary", kind="f"),
    "windows.pcd": pcd(cloud(), "binary", end="\r\n"),
    "no-points.pcd": pcd(cloud(), "binary", points=False),
    "upper.PCD": pcd(cloud(), "binary"),
    "ascii.ply": ply(cloud()),
    "little.ply": ply(cloud(), "binary_little_endian"),
    "big.ply": ply(cloud(), "binary_big_endian"),
    "grid.ply": ply(
        cloud(), "ascii", ("comment made by a scanner", "obj_info num_cols 30", "obj_info num_rows 20")
    ),
    "comment.ply": ply(cloud(), "binary_little_endian", ("comment Width: 30", "comment Height: 20")),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_points_that_were_written(rgb: Path, name: str) -> None:
    path = rgb.with_name(name)
    path.write_bytes(SPELLINGS[name])
    np.testing.assert_array_equal(read_frame(rgb, path).xyz, cloud())


def test_doubles_among_other_fields(rgb: Path) -> None:
    path, values = rgb.with_name("double.ply"), np.random.default_rng(0).normal(size=(HEIGHT * WIDTH, 3))
    rows = np.zeros(len(values), [("label", "i2"), ("z", "f8"), ("y", "f8"), ("x", "f8")])
    rows["x"], rows["y"], rows["z"] = values.T
    names = "".join(f"property {k} {n}\n" for k, n in (("short", "label"), *(("double", a) for a in "zyx")))
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{names}end_header\n"
    path.write_bytes(head.encode() + rows.tobytes())
    np.testing.assert_array_equal(read_frame(rgb, path).xyz.reshape(-1, 3), values.astype(np.float32))


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
def test_a_cloud_on_another_grid_is_never_reshaped(rgb: Path, form: str) -> None:
    path = rgb.with_name("turned.pcd")
    path.write_bytes(pcd(cloud().swapaxes(0, 1), form, width=HEIGHT, height=WIDTH))
    with pytest.raises(FrameError, match=r"turned.pcd is a grid of 20x30 points but its image 30x20 pixels"):
        read_frame(rgb, path)
    path.write_bytes(pcd(cloud(), form, width=HEIGHT * WIDTH, height=1))
    with pytest.raises(
        FrameError, match=r"says that it is unorganized \(600x1 points\) but its image 30x20 pixels; expected"
    ):
        read_frame(rgb, path)


def test_a_ply_that_gives_its_grid_is_held_to_it(rgb: Path) -> None:
    path = rgb.with_name("turned.ply")
    path.write_bytes(ply(cloud(), notes=("obj_info num_cols 20", "obj_info num_rows 30")))
    with pytest.raises(FrameError, match="is a grid of 20x30 points but its image 30x20 pixels"):
        read_frame(rgb, path)
    path.write_bytes(ply(cloud(), count=599))
    with pytest.raises(
        FrameError, match="holds 599 points but its image 600 pixels; expected an organized cloud"
    ):
        read_frame(rgb, path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("ascii.pcd", b"POINTS 600", b"POINTS 599", r"\(its header gives 599 points but a grid of 30 x 20\)"),
        (
            "ascii.pcd",
            b"FIELDS x y z",
            b"FIELDS u v w",
            r"its fields are 'u', 'v', 'w', 'rgb', 'normal', expected x",
        ),
        ("binary.pcd", b"TYPE F F F", b"TYPE I I I", "expected x, y and z as floats"),
        ("binary.pcd", b"DATA binary", b"DATA gzip99", "its DATA is 'gzip99', expected ascii"),
        ("binary.pcd", b"HEIGHT 20\n", b"", "cannot be read as PCD"),
        ("ascii.pcd", b"SIZE 4 4 4 4 4", b"SIZE 4 4 4", "cannot be read as PCD"),
        ("ascii.ply", b"element vertex", b"element face 1\nelement vertex", "its first element is 'face'"),
        (
            "ascii.ply",
            b"property uint rgb",
            b"property list uchar int rgb",
            "its vertices are not plain numbers",
        ),
        ("ascii.ply", b"format ascii", b"format \x1b[31m", r"cannot be read as PLY \([^\x1b]*\)"),
        ("ascii.ply", b"ply\n", b"PLY?\n", "does not begin with `ply`"),
    ],
)
def test_headers_that_cannot_be_read_say_why(
    rgb: Path, name: str, old: bytes, new: bytes, message: str
) -> None:
    path = rgb.with_name(name)
    assert old in SPELLINGS[name]
    path.write_bytes(SPELLINGS[name].replace(old, new, 1))
    with pytest.raises(FrameError, match=message):
        read_frame(rgb, path)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.95])
def test_truncated_clouds_are_refused(rgb: Path, name: str, kept: float) -> None:
    path, content = rgb.with_name(name), SPELLINGS[name]
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(FrameError, match=r"cannot be read as (PLY|PCD) .*may be truncated, so copy it again"):
        read_frame(rgb, path)


@pytest.mark.parametrize("name", ["ascii.pcd", "binary.pcd", "binary_compressed.pcd", "ascii.ply", "big.ply"])
def test_damaged_bytes_end_in_a_sentence_or_a_frame(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / "part.png")

    @settings(max_examples=150, deadline=None)
    @given(edits=st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), min_size=1, max_size=6))
    def damage(edits: list[tuple[int, int]]) -> None:
        content = bytearray(SPELLINGS[name])
        for position, value in edits:
            content[position] = value
        (folder / name).write_bytes(content)
        try:
            frame = read_frame(folder / "part.png", folder / name)
        except FrameError as error:
            assert str(error).isprintable()  # noqa: PT017 - most damage is refused, harmless damage is read
        else:
            assert frame.xyz.shape == (HEIGHT, WIDTH, 3)

    damage()
