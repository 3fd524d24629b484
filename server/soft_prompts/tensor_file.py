"""Reads safetensors files: checks the header first, then reads single tensors.

Files are read, never mapped: if someone rewrites a mapped file (the inbox is a folder for people), SIGBUS ends the
whole process. Nothing is allocated for a header's claims before they agree with the file's size.

The safetensors package cannot be used: `safe_open` maps the file to check its header, even with `backend="pread"`
(0.8), and `deserialize` takes the whole file and copies it. It also accepts duplicate tensor names, unknown fields, and
lists instead of entries.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {…}, name: {"dtype": "F32", "shape": [20, 576], "data_offsets": [0, 46080]}, …}
    data         the tensors, one after the other without a gap
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from server.errors import InvalidSoftPrompt
from server.soft_prompts.manifest import parse_json_object
from server.soft_prompts.soft_prompt import DTYPES

MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 1024
MAX_DIMENSIONS = 8
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits per number by safetensors' dtype; most dtypes are listed only to report that they are not served."""
SEND_WHOLE = "Send the whole file as safetensors wrote it."


@dataclass(frozen=True, slots=True)
class Entry:
    """The header's entry for a tensor; offsets are relative to the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open safetensors file with a checked header."""

    name: str
    entries: dict[str, Entry]
    _file: IO[bytes]
    _data_start: int

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor; raises InvalidSoftPrompt if there is none of that name, or its dtype is not served."""
        entry = self.entries.get(tensor)
        if entry is None:
            held = ", ".join(name[:64] for name in sorted(self.entries)[:5])
            raise InvalidSoftPrompt(f"{self.name} has no tensor {tensor!r}; it holds {held or 'none'}.")
        if entry.dtype not in DTYPES:
            raise InvalidSoftPrompt(
                f"{tensor} has dtype {entry.dtype}; taken are {', '.join(DTYPES)}.",
                remedy="Convert the tensor to float32 and save it again.",
            )
        return entry.shape

    def read(self, tensor: str) -> torch.Tensor:
        """Read a tensor whose shape was checked; raises InvalidSoftPrompt if the file was truncated since."""
        entry = self.entries[tensor]
        self._file.seek(self._data_start + entry.begin)
        data = bytearray(self._file.read(entry.end - entry.begin))
        if len(data) != entry.end - entry.begin:
            raise _changed(self.name)
        if not data:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a pipe would block the reader forever.

    Links are followed; the type of the file that they lead to counts.

    Raises:
        InvalidSoftPrompt: the path is a directory, a pipe, a socket or a device.
        OSError: the file is missing or not readable.
    """
    _check_regular(path, path.stat())  # checked before opening, because even opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK: a pipe created meanwhile does not block
    try:
        _check_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file and check its header against its size.

    Raises InvalidSoftPrompt for another format, or a file that is truncated, damaged, or changed while it is read.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, before.st_size - 8):
            raise InvalidSoftPrompt(
                f"{path.name} is not a safetensors file: {before.st_size} bytes, of which its header claims {length}.",
                remedy=f"{SEND_WHOLE[:-1]}; it may have been cut off, or be of another format.",
            )
        entries = _entries(file.read(length), path.name, before.st_size - 8 - length)
        yield TensorFile(path.name, entries, file, 8 + length)
        after = os.fstat(file.fileno())
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise _changed(path.name)


def _check_regular(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise InvalidSoftPrompt(f"{path.name} is not a regular file.", remedy="Put a file of that name in its place.")


def _entries(header: bytes, name: str, data_bytes: int) -> dict[str, Entry]:
    """The tensors of a header in the order of their data, which they must cover without gaps or overlaps."""
    if not header.startswith(b"{"):
        raise _damaged(name, "its header does not begin with a brace.")
    try:
        value = parse_json_object(header, "its header")
    except InvalidSoftPrompt as exc:
        raise _damaged(name, exc.message) from exc
    metadata = value.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(name, f"{METADATA} must map names to text.")
    if len(value) > MAX_TENSORS:
        raise _damaged(name, f"it has {len(value)} tensors; at most {MAX_TENSORS} are taken.")
    entries = {tensor: _entry(tensor, facts, name) for tensor, facts in value.items()}
    at = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _damaged(name, f"the data of {tensor[:64]!r} begins at {entry.begin}, expected {at}.")
        at = entry.end
    if at != data_bytes:
        raise _damaged(name, f"its header describes {at} bytes of data, and there are {data_bytes}.")
    return entries


def _entry(tensor: str, facts: Any, name: str) -> Entry:
    called = repr(tensor[:64])
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(name, f"{called} needs dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(name, f"the dtype of {called} is not one of safetensors.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(name, f"the shape of {called} is not a list of at most {MAX_DIMENSIONS} sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(name, f"the data_offsets of {called} are not the begin and end of its data.")
    begin, end = offsets
    if prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise _damaged(name, f"{called} of shape {shape} does not fill its {end - begin} bytes.")
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _damaged(name: str, problem: str) -> InvalidSoftPrompt:
    return InvalidSoftPrompt(f"{name} is damaged: {problem}", remedy=SEND_WHOLE)


def _changed(name: str) -> InvalidSoftPrompt:
    return InvalidSoftPrompt(
        f"{name} was rewritten while it was read.", remedy="Write it under another name and rename it into place."
    )
