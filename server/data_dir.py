"""Data files that a request names, inside PRELUDE_DATA_DIR only."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from server.errors import InvalidRequest

UPLOAD_INSTEAD = "Name a file inside PRELUDE_DATA_DIR, or upload it."


def resolve_data(name: str, data_dir: Path | None) -> Path:
    """The file that a request means by a name.

    The name is not trusted: neither `..` nor an absolute path nor a link leads out of the folder, and a
    refusal does not tell what lies outside.

    Raises:
        InvalidRequest: no folder is set, the name leads out of it, or there is no such file in it.
    """
    shown = repr(name[:200])
    if data_dir is None:
        raise InvalidRequest(
            f"The server has no folder of data files, so {shown} names nothing.",
            remedy="Upload the file, or start the server with PRELUDE_DATA_DIR.",
            param="data",
        )
    path = PurePosixPath(name)
    is_plain = name.isprintable() and not ("\\" in name or ":" in name or path.is_absolute() or ".." in path.parts)
    if not is_plain or not path.parts:
        raise InvalidRequest(f"{shown} is no name of a data file.", remedy=UPLOAD_INSTEAD, param="data")
    missing = InvalidRequest(f"There is no data file {shown}.", remedy=UPLOAD_INSTEAD, param="data")
    try:
        root = data_dir.resolve(strict=True)
        found = (root / path).resolve(strict=True)
        is_inside = found.is_relative_to(root) and found.is_file()
    except (OSError, RuntimeError, ValueError) as exc:  # no such file; links in a circle; a name too long
        raise missing from exc
    if not is_inside:
        raise missing
    return found
