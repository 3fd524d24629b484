"""Durable writes: files are complete or absent, even after a loss of power."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from server.errors import StoreError, StoreFull

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or quota."""


def not_stored(exc: OSError, what: str, where: str) -> StoreError:
    """The error for data that cannot be stored: "The upload", "its temporary folder (TMPDIR)"."""
    full = exc.errno in NO_SPACE
    return (StoreFull if full else StoreError)(
        f"{what} cannot be kept: {exc.strerror or exc}.",
        remedy=f"Make room in {where}, then send it again." if full else f"Check that the server may write to {where}.",
    )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old or the new content. An existing file keeps its mode.

    Raises OSError if the file cannot be written; an old file is unchanged then.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # frees space if the disk is full
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync); raises OSError if that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Network file systems that write entries immediately do not support fsync on folders.
        if exc.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
