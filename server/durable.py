"""Durable writes: files are complete or absent, even after a loss of power."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from server.errors import StoreError, StoreFull

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""


def not_stored(exc: OSError, what: str, where: str) -> StoreError:
    """The error for what the server has no place for: "The upload", "its temporary folder (TMPDIR)"."""
    full = exc.errno in NO_SPACE
    return (StoreFull if full else StoreError)(
        f"{what} cannot be kept: {exc.strerror or exc}.",
        remedy=f"Make room in {where}, then send it again." if full else f"Check that the server may write to {where}.",
    )


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in its place in one step: readers see the old content or the new one. An old file keeps its mode.

    Raises:
        OSError: it cannot be written; the old file is still there then.
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
        temporary.unlink(missing_ok=True)  # where no space is left, what was written of it takes some
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to its disk.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # network file systems that write names at once have no such call
            raise
    finally:
        os.close(descriptor)
