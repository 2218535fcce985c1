"""A folder that fills up: which frames in it are whole, and how they are taken into the station's own folder."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from m3ad.atomic import file_beside
from m3ad.camera import Camera, find_camera
from m3ad.frames import RGB_SUFFIXES
from m3ad.xyz import DEPTH_SUFFIXES, XYZ_SUFFIXES

from m3ad_client.station import config

PARTNER_S = 60.0  # after which a file without its partner is told of
MARKER = ".done"

State = tuple[int, int, int, int]  # sizes and times of both files


@dataclass(frozen=True, slots=True)
class Found:
    """A frame in the folder; `is_marked` where its marker lies there."""

    name: str
    rgb: Path
    xyz: Path
    is_marked: bool


@dataclass
class Inbox:
    """A camera's folder.

    Args:
        camera: its configuration.
        clock: seconds that only grow, whatever is done to the clock on the wall.

    Attributes:
        complaint: what in the folder is no frame and stays where it is, in a sentence; None when there is nothing.
        waiting: frames that are there and not whole yet.
    """

    camera: config.Camera
    clock: Callable[[], float] = time.monotonic
    complaint: str | None = None
    waiting: int = 0
    _states: dict[str, tuple[State, float]] = field(default_factory=dict)
    _alone: dict[Path, float] = field(default_factory=dict)

    def settled(self) -> list[Found]:
        """Frames that are whole, the oldest first.

        Raises:
            OSError: the folder cannot be read.
        """
        now = self.clock()
        pairs, odd = self._pairs(now)
        whole: list[tuple[int, str, Found]] = []
        states: dict[str, tuple[State, float]] = {}
        for name, found in pairs.items():
            try:
                rgb, xyz = found.rgb.stat(), found.xyz.stat()
            except FileNotFoundError:  # somebody else took it
                continue
            state = (rgb.st_size, rgb.st_mtime_ns, xyz.st_size, xyz.st_mtime_ns)
            before, since = self._states.get(name, (None, now))
            states[name] = (state, since if before == state else now)
            settled = now - states[name][1] >= self.camera.settle_s and min(rgb.st_size, xyz.st_size) > 0
            if found.is_marked if self.camera.done_marker else settled:
                whole.append((max(rgb.st_mtime_ns, xyz.st_mtime_ns), name, found))
        self._states = states
        self.waiting = len(pairs) - len(whole)
        self.complaint = odd
        return [found for *_, found in sorted(whole, key=lambda entry: entry[:2])]

    def depth_camera(self) -> Camera | None:
        """The camera whose file lies beside or above the folder's depth images; they are kept elsewhere, without it."""
        depth = self.camera.folder / "depth"
        return find_camera(depth / "0.png") if depth.is_dir() else None

    def unmark(self, rgb: Path) -> None:
        """Remove the markers of an image that was taken: another frame may come by its name."""
        if self.camera.done_marker:
            remove(*self._markers(rgb))

    def _pairs(self, now: float) -> tuple[dict[str, Found], str | None]:
        folder = self.camera.folder
        clouds = next((folder / name for name in ("xyz", "depth") if (folder / name).is_dir()), folder)
        if (folder / "rgb").is_dir():
            images = _by_stem(folder / "rgb", RGB_SUFFIXES)
            points = _by_stem(clouds, DEPTH_SUFFIXES if clouds.name == "depth" else XYZ_SUFFIXES)
            groups = {n: [*images.get(n, ()), *points.get(n, ())] for n in images.keys() | points.keys()}
            is_pair = {n: len(images.get(n, ())) == len(points.get(n, ())) == 1 for n in groups}
        else:
            groups = {n: _image_first(p) for n, p in _by_stem(folder, (*RGB_SUFFIXES, *XYZ_SUFFIXES)).items()}
            is_pair = {n: len(p) == 2 and _is_image(p[0]) and _is_cloud(p[1]) for n, p in groups.items()}
        found = {
            name: Found(name, paths[0], paths[1], any(p.is_file() for p in self._markers(paths[0])))
            for name, paths in groups.items()
            if is_pair[name]
        }
        odd = {path for name, paths in groups.items() if not is_pair[name] for path in paths}
        self._alone = {path: self._alone.get(path, now) for path in odd}
        late = sorted(path for path, since in self._alone.items() if now - since >= PARTNER_S)
        if not late:
            return found, None
        more = f" (and {len(late) - 1} more)" if len(late) > 1 else ""
        return (
            found,
            f"{late[0]}{more} is no pair of one image and one cloud of the same name, so it is not judged",
        )

    def _markers(self, rgb: Path) -> tuple[Path, Path]:
        return rgb.with_name(rgb.stem + MARKER), self.camera.folder / (rgb.stem + MARKER)


def move(source: Path, target: Path) -> None:
    """Move a file to a place of its own; what is there was moved by whoever was killed afterwards, and stays.

    Between file systems it is there whole before it goes.

    Raises:
        OSError: there is no room, or neither file is there.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with file_beside(target) as temporary:
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as copy:
                os.fsync(copy.fileno())
        source.unlink()


def remove(*paths: Path) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if not entry.name.startswith(".") and suffix.lower() in suffixes and entry.is_file():
                found.setdefault(stem, []).append(folder / entry.name)
    return found


def _image_first(paths: list[Path]) -> list[Path]:
    """Beside an image a TIFF is the cloud, beside a cloud it is the image."""
    return sorted(paths, key=lambda path: _is_cloud(path) - _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in RGB_SUFFIXES


def _is_cloud(path: Path) -> bool:
    return path.suffix.lower() in XYZ_SUFFIXES
