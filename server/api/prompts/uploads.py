"""Turns an upload (the files, or one zip of them) into a PEFT directory, within a size limit.

A zip is never trusted: only the files of a soft prompt are extracted, under fixed names, and bytes are counted during
extraction, because the sizes in the zip's directory may be false. All extracted files together may have the size of an
upload. A limit on the compression ratio would only add wrong refusals: a zip bomb costs no more than an honest upload
of that size, entries that share bytes are counted each time they are extracted, and a real soft prompt that was
initialised with zeros compresses 1000:1.
"""

import errno
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from fastapi import UploadFile

from server.api.files import copy_within, upload_not_stored
from server.errors import InvalidSoftPrompt, PayloadTooLarge
from server.soft_prompts.declared import CONFIG_FILE
from server.soft_prompts.formats import MANIFEST_FILE, PICKLE_FILES, TENSOR_FILE

ACCEPTED_FILES = (CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE)
MAX_ZIP_ENTRIES = 64
MAX_DIRECTORY_BYTES = 2**18
END_RECORD_REACH = 2**16 + 22 + 20
"""Bytes at a zip's end that contain its end record: the longest comment, the record, and zip64's locator before it."""
BROKEN_ZIP = (
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, ArithmeticError, LookupError, RuntimeError, ValueError),
)
"""Exceptions that zipfile raises for damaged or forged zips; it documents only the first."""
MAKE_PLAIN = "Make a plain zip of the files."


class Unpacked(NamedTuple):
    """A directory with the files of a soft prompt, and the names of the ignored files of the upload."""

    directory: Path
    ignored: list[str]


@contextmanager
def unpacked_upload(files: Sequence[UploadFile], max_bytes: int) -> Iterator[Unpacked]:
    """Context manager: an upload's files in a temporary directory, which is always removed at the end.

    Raises what `unpack_upload` raises, and StoreError if the temporary directory cannot be written or read.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="prelude-upload-") as folder:
            yield Unpacked(Path(folder), unpack_upload(files, Path(folder), max_bytes))
    except OSError as exc:
        raise upload_not_stored(exc) from exc


def unpack_upload(files: Sequence[UploadFile], directory: Path, max_bytes: int) -> list[str]:
    """Write the files of a soft prompt into a directory; returns the names of ignored files.

    Raises InvalidSoftPrompt or PayloadTooLarge if a file does not belong, the zip is unsafe, or the files exceed
    `max_bytes`.
    """
    names = [_path(file.filename or "").name for file in files]
    if len(files) == 1 and names[0].lower().endswith(".zip"):
        return _unzip(files[0].file, directory, max_bytes)
    ignored = []
    for name, file in zip(names, files, strict=True):
        if name in ACCEPTED_FILES:
            max_bytes -= copy_within(file.file, _new(directory, name), max_bytes, _too_large())
            continue
        if name not in (*PICKLE_FILES, "README.md"):
            raise InvalidSoftPrompt(
                f"{name[:100]!r} is not a file of a soft prompt.",
                remedy=f"Send {CONFIG_FILE}, {TENSOR_FILE} and optionally {MANIFEST_FILE}, or one .zip of them.",
            )
        ignored.append(_leave_out(name, directory))
    return ignored


def _unzip(source: IO[bytes], directory: Path, max_bytes: int) -> list[str]:
    ignored = []
    try:
        _check_directory(source)
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ZIP_ENTRIES:
                raise InvalidSoftPrompt(f"The zip has {len(entries)} entries; at most {MAX_ZIP_ENTRIES} are accepted.")
            for entry in entries:
                _check_entry(entry)
            files = {entry: _path(entry.filename) for entry in entries if entry.filename[-1:] not in ("/", "\\")}
            _check_folders([path for path in files.values() if path.name in ACCEPTED_FILES])
            for entry, path in files.items():
                if path.name not in ACCEPTED_FILES:
                    ignored.append(_leave_out(path.name, directory))
                    continue
                with archive.open(entry) as file:
                    max_bytes -= copy_within(file, _new(directory, path.name), max_bytes, _too_large())
    except (*BROKEN_ZIP, OSError) as exc:
        # EINVAL is a seek to an offset that no file can have.
        if isinstance(exc, OSError) and exc.errno != errno.EINVAL:
            raise
        raise InvalidSoftPrompt(f"The zip cannot be read: {str(exc)[:200]}.", remedy=MAKE_PLAIN) from exc
    return ignored


def _path(name: str) -> PurePosixPath:
    """A file's path; Windows may write its name with backslashes."""
    return PurePosixPath(name.replace("\\", "/"))


def _check_folders(paths: Sequence[PurePosixPath]) -> None:
    """Refuse files from different folders: a config and a tensor may then belong to different soft prompts."""
    folders = sorted({str(path.parent) for path in paths})
    # Otherwise a file occurs twice, and that error is clearer.
    if len(folders) > 1 and len({path.name for path in paths}) == len(paths):
        raise InvalidSoftPrompt(
            f"The zip has files of a soft prompt in {folders[0][:100]!r} and in {folders[1][:100]!r}.",
            remedy="Zip the files of one soft prompt, in one folder.",
        )


def _leave_out(name: str, directory: Path) -> str:
    """The name to report for a file that is not used."""
    if name in PICKLE_FILES:
        (directory / name).touch()  # formats.py explains the problem if there is no other tensor file
    return name[:100]


def _check_directory(source: IO[bytes]) -> None:
    """Refuse a zip by its end record, before zipfile reads a directory that may have a million entries."""
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - END_RECORD_REACH))
    tail = source.read()
    source.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise InvalidSoftPrompt("The zip cannot be read: it has no end.", remedy=MAKE_PLAIN)
    entries, directory_bytes = struct.unpack("<HI", tail[at + 10 : at + 16])
    is_zip64 = tail[at - 20 : at - 16] == b"PK\x06\x07"
    if is_zip64 or entries > MAX_ZIP_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InvalidSoftPrompt(
            f"The zip has {entries} entries or more; at most {MAX_ZIP_ENTRIES} are accepted.",
            remedy="Zip only the files of the soft prompt.",
        )


def _check_entry(entry: zipfile.ZipInfo) -> None:
    """Refuse entries that point outside the zip, are links or devices, are encrypted, or use a rare compression."""
    path = _path(entry.filename)
    if path.is_absolute() or ".." in path.parts or ":" in entry.filename:
        raise InvalidSoftPrompt(f"The zip has an entry outside its folder: {entry.filename[:100]!r}.")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InvalidSoftPrompt(
            f"The zip has a link or a device: {entry.filename[:100]!r}.", remedy="Zip the files themselves."
        )
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidSoftPrompt("The zip uses a rare compression.", remedy=MAKE_PLAIN)
    if entry.flag_bits & 1:
        raise InvalidSoftPrompt("The zip is encrypted.", remedy=MAKE_PLAIN)


def _new(directory: Path, name: str) -> Path:
    path = directory / name
    if path.exists():
        raise InvalidSoftPrompt(f"{name} comes twice.", remedy="Send each file once.")
    return path


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge("The unpacked files of the soft prompt exceed the server's limit.")
