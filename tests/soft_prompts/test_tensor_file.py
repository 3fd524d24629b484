"""The safetensors reader: it believes nothing that the file does not bear out, and survives whoever rewrites it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from server.errors import InvalidSoftPrompt
from server.soft_prompts.tensor_file import BITS, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS, open_tensor_file

NAME = "prompt_embeddings"
GOOD = {NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
DATA = struct.pack("<6f", *range(6))


def packed(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {NAME: {**GOOD[NAME], **changes}}


def read(folder: Path, content: bytes) -> torch.Tensor:
    (folder / "x.safetensors").write_bytes(content)
    with open_tensor_file(folder / "x.safetensors") as tensors:
        tensors.shape(NAME)
        return tensors.read(NAME)


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.randn(5, 7).to(dtype)
        content = save({NAME: tensor, "other": torch.ones(3, dtype=torch.int64), "empty": torch.ones(0, 4)})
        assert torch.equal(read(tmp_path, content), tensor)


@pytest.mark.parametrize("padding", range(9))
def test_the_data_may_begin_at_any_byte(tmp_path: Path, padding: int) -> None:
    header = json.dumps(GOOD).encode() + b" " * padding
    assert read(tmp_path, packed(header)).flatten().tolist() == list(range(6))


def test_it_knows_every_kind_of_number_that_safetensors_knows() -> None:
    with pytest.raises(SafetensorError) as caught:
        load(packed(entry(dtype="nonsense")))
    told = str(caught.value)
    assert "expected one of" in told
    assert {name for name in BITS if f"`{name}`" in told} == set(BITS)
    assert told.count("`") == 2 * (len(BITS) + 1)


BAD: dict[str, tuple[bytes, str]] = {
    "a field twice": (packed(b'{"a": {}, "a": {}}'), "'a' twice"),
    "a tensor twice": (packed(json.dumps(GOOD).encode()[:-1] + b", " + json.dumps(GOOD).encode()[1:]), "twice"),
    "a shape twice": (packed(json.dumps(GOOD).replace('"shape"', '"shape": [6, 1], "shape"').encode()), "twice"),
    "metadata is null": (packed({"__metadata__": None, **GOOD}), "__metadata__ must map"),
    "metadata is a list": (packed({"__metadata__": [], **GOOD}), "__metadata__ must map"),
    "metadata holds numbers": (packed({"__metadata__": {"format": 1}, **GOOD}), "__metadata__ must map"),
    "metadata is deep": (packed({"__metadata__": {"a": {"b": "c"}}, **GOOD}), "__metadata__ must map"),
    "a header of UTF-16": (packed(json.dumps(GOOD).encode("utf-16")), "brace"),
    "a byte order mark": (packed(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), "brace"),
    "nested": (packed(b'{"a":' * 70 + b"1" + b"}" * 70), "nested"),
    "a tensor is a list": (packed({NAME: []}), "needs dtype"),
    "no dtype": (packed({NAME: {"shape": [2, 3], "data_offsets": [0, 24]}}), "needs dtype"),
    "a field too much": (packed(entry(more=1)), "nothing else"),
    "dtype is a number": (packed(entry(dtype=1)), "dtype"),
    "dtype is unknown": (packed(entry(dtype="F31")), "dtype"),
    "shape is text": (packed(entry(shape="23")), "shape"),
    "shape of fractions": (packed(entry(shape=[2.0, 3.0])), "shape"),
    "shape of truths": (packed(entry(shape=[True, 6])), "shape"),
    "shape is negative": (packed(entry(shape=[-2, -3])), "shape"),
    "shape beyond 2^63": (packed(entry(shape=[2**63, 0])), "shape"),
    "too many dimensions": (packed(entry(shape=[1] * MAX_DIMENSIONS + [6])), "shape"),
    "shape lies": (packed(entry(shape=[2, 4])), "does not fill"),
    "shape overflows 64 bits to the right size": (packed(entry(shape=[2**62 + 1, 6])), "does not fill"),
    "three offsets": (packed(entry(data_offsets=[0, 24, 24])), "data_offsets"),
    "offsets of fractions": (packed(entry(data_offsets=[0.0, 24.0])), "data_offsets"),
    "offsets reversed": (packed(entry(data_offsets=[24, 0])), "data_offsets"),
    "a gap": (packed(entry(data_offsets=[4, 28]), DATA + bytes(4)), "begins at 4, expected 0"),
    "an overlap": (packed({**GOOD, "z": {**GOOD[NAME], "data_offsets": [20, 44]}}, DATA + bytes(20)), "expected 24"),
    "data too long": (packed(GOOD, DATA + b"\0"), "describes 24 bytes of data, and there are 25"),
    "data too short": (packed(GOOD, DATA[:-1]), "there are 23"),
    "too many tensors": (
        packed({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}, b""),
        f"at most {MAX_TENSORS}",
    ),
    "a header over the limit": (packed(json.dumps(GOOD).encode().ljust(MAX_HEADER_BYTES + 1)), "its header claims"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_add_up_is_refused(tmp_path: Path, name: str) -> None:
    content, part = BAD[name]
    with pytest.raises(InvalidSoftPrompt) as caught:
        read(tmp_path, content)
    assert part in caught.value.message
    assert len(caught.value.message) < 300


def test_the_longest_header_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path, packed(json.dumps(GOOD).encode().ljust(MAX_HEADER_BYTES))).shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        {NAME: {"dtype": "F32", "shape": [2**35, 32], "data_offsets": [0, 2**42]}},
        {NAME: {"dtype": "F32", "shape": [2**35, 32], "data_offsets": [0, 1400]}},
        {NAME: {"dtype": "F4", "shape": [2**43], "data_offsets": [0, 2**42]}},
    ],
)
def test_a_small_file_that_claims_terabytes_costs_nothing(tmp_path: Path, header: dict[str, Any]) -> None:
    content = packed(header, bytes(1400))
    assert len(content) < 1600
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(InvalidSoftPrompt, match="damaged"):
        read(tmp_path, content)
    assert time.monotonic() - started < 0.5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def read_rewritten(path: Path, content: bytes, *, before: bool) -> None:
    """Read a file that somebody rewrites before or after its numbers are read."""
    path.write_bytes(packed(GOOD))
    with open_tensor_file(path) as tensors:
        if before:
            path.write_bytes(content)
        tensors.read(NAME)
        path.write_bytes(content)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSoftPrompt, match="rewritten while it was read"):
        read_rewritten(tmp_path / "x", b"", before=True)


def test_a_file_that_is_rewritten_while_it_is_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSoftPrompt, match="rename it into place"):
        read_rewritten(tmp_path / "x", packed(GOOD, DATA[::-1]) + b"\0", before=False)


READER = """
import sys, time
from pathlib import Path
from server.errors import InvalidSoftPrompt
from server.soft_prompts.tensor_file import open_tensor_file

path, outcomes = Path(sys.argv[1]), {True: 0, False: 0}
print("ready", flush=True)
end = time.monotonic() + 0.7
while time.monotonic() < end:
    try:
        with open_tensor_file(path) as tensors:
            tensors.read("prompt_embeddings").sum()
        outcomes[True] += 1
    except InvalidSoftPrompt:
        outcomes[False] += 1
print(outcomes[False])
"""


def test_a_process_that_reads_outlives_one_that_rewrites(tmp_path: Path) -> None:
    # A mapped file would end the reader with SIGBUS within a second.
    content = save({NAME: torch.zeros(500, 2048)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with subprocess.Popen([sys.executable, "-c", READER, path], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        while reader.poll() is None:
            path.write_bytes(content)
        assert reader.returncode == 0
        assert int(reader.stdout.read()) > 0
