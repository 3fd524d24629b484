"""Resolves data files that a request names, only inside PRELUDE_DATA_DIR."""

from pathlib import Path, PurePosixPath

from server.errors import InvalidRequest

UPLOAD_INSTEAD = "Name a file inside PRELUDE_DATA_DIR, or upload it."


def resolve_data(name: str, data_dir: Path | None) -> Path:
    """The path of a data file that a request names.

    The name is not trusted: `..`, absolute paths and links cannot leave the folder, and a refusal does not reveal files
    outside. Raises InvalidRequest if no folder is set, the name leads out of it, or it contains no such file.
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
    except (OSError, RuntimeError, ValueError) as exc:  # no such file, circular links, or a name that is too long
        raise missing from exc
    if not is_inside:
        raise missing
    return found
