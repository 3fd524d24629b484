"""Writing files so that they are whole or not there, also after a loss of power."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in its place in one step: readers see the old content or the new one.

    Raises:
        OSError: it cannot be written; the old file is still there then.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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
