"""Files and folders that are there whole or not at all, whoever is killed and whoever writes beside.

Locks are `flock`'s: the kernel drops them with their process. Where a file system has none, writing goes on without.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
# No room, quota, file too large, read-only: about the place that is written to, whatever file the system names.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; who else wants it waits."""
    while True:
        descriptor = _lock(folder, fcntl.LOCK_EX)
        # It may have been replaced while we waited.
        if descriptor is None or os.fstat(descriptor).st_ino == folder.stat().st_ino:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, hidden and on its file system; it is gone afterwards unless it was moved.

    What killed writers of the same target left is removed first: nobody holds its lock.
    """
    prefix = f".{target.name}.m3ad-"
    with locked(target.parent):
        for left in target.parent.iterdir():
            if left.name.startswith(prefix) and left.is_dir() and not left.is_symlink():
                descriptor = _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if descriptor is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(descriptor)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        held = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an older target takes its name instead, and no moment is without one of the two."""
    if not os.path.lexists(target):
        try:
            os.replace(folder, target)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another writer was faster
                raise
    if not _exchange(folder, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, aside / target.name)
        os.replace(folder, target)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; what lies there takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders took each other's names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return bool(done == 0)


def _lock(folder: Path, how: int) -> int | None:
    """An open descriptor that holds the folder's lock, or None: somebody else does, or there are no locks here."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, how)
        return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None
