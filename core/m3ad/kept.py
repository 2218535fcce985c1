"""A part's frame as a station kept it: for whoever judges it again, or learns from it."""

from pathlib import Path

from m3ad.bundle import sha256_of
from m3ad.camera import Camera, find_camera
from m3ad.errors import FrameError
from m3ad.frames import Frame, read_frame
from m3ad.ledger import Part


def kept_frame(folder: Path, part: Part, camera: Camera | None) -> Frame | None:
    """The frame of a part, None where its files were removed since or are not those that were judged.

    Args:
        folder: the station's, where the ledger lies.
        part: of that ledger.
        camera: of depth images, where no file beside those that came says which.

    Raises:
        FrameError: the files are there and are no frame.
    """
    files = folder / part.rgb, folder / part.xyz
    try:
        if tuple(map(sha256_of, files)) != (part.rgb_sha256, part.xyz_sha256):
            return None
        beside = find_camera(Path(part.xyz_from)) if part.xyz.endswith(".png") else None
        return read_frame(*files, part.name, beside or camera)
    except FileNotFoundError:
        return None
    except FrameError:
        # A station's retention may remove them at any moment.
        if all(path.exists() for path in files):
            raise
        return None
