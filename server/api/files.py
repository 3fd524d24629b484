"""Copies of uploaded files within a limit, and the error if there is no space for them."""

from functools import partial
from pathlib import Path
from typing import IO

from server.durable import not_stored
from server.errors import PreludeError

CHUNK = 2**18

upload_not_stored = partial(not_stored, what="The upload", where="its temporary folder (TMPDIR)")
"""The error for an upload that cannot be stored (no disk space)."""


def copy_within(source: IO[bytes], target: Path, room: int, too_large: PreludeError) -> int:
    """Copy a file of at most `room` bytes; returns its number of bytes.

    Raises:
        PreludeError: `too_large`, which the caller gives.
        OSError: a file cannot be read or written.
    """
    size = 0
    with target.open("wb") as file:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > room:
                raise too_large
            file.write(chunk)
    return size
