"""Damage for fuzzing: real soft prompts and zips of them, changed a little by dice, as bytes and in their structure."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.peft_files import CONFIG, KINDS, MANIFEST, TENSORS, peft_directory

Files = dict[str, bytes]
Bytes = Callable[[random.Random, bytes], bytes]

SHIPPED = Path(__file__).parent.parent / "prompts"

FULL_MANIFEST = {
    "base_model": {"name": "tiny-llama"},
    "description": "Größe",
    "generation": {"max_new_tokens": 5, "stop": ["\n"], "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7},
    "input_template": "Text: {input}\n",
    "labels": ["ham", "spam"],
    "metrics": {"exact_match": 0.95},
    "training": {"seed": 1, "hyperparameters": {"lr": 0.02, "betas": [0.9, 0.99]}},
}


def tiny_corpus(folder: Path) -> list[Files]:
    """Soft prompts of every kind as PEFT writes them for the tiny model, with and without a manifest."""
    corpus = []
    for kind in KINDS:
        files = read_files(peft_directory(folder / kind, kind))
        manifest = json.dumps(FULL_MANIFEST, ensure_ascii=False).encode()
        corpus += [files, {**files, MANIFEST: manifest}]
    return corpus


def shipped_corpus() -> list[Files]:
    """Of the soft prompts that ship the smallest of each kind: what is damaged is a format, not a task."""
    found: dict[str, Files] = {}
    for folder in sorted(SHIPPED.iterdir()):
        if (folder / CONFIG).exists():
            files = read_files(folder)
            kind = json.loads(files[CONFIG])["peft_type"]
            if kind not in found or len(files[TENSORS]) < len(found[kind][TENSORS]):
                found[kind] = files
    return list(found.values())


def read_files(folder: Path) -> Files:
    """A PEFT directory's files, as they would be uploaded."""
    return {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS, MANIFEST) if (folder / name).exists()}


def mutate_files(dice: random.Random, files: Files) -> Files:
    """Change one file, or two."""
    changed = dict(files)
    for _ in range(dice.choice((1, 1, 1, 2))):
        name = dice.choice(sorted(changed))
        mutate = dice.choice((mutate_tensors, mutate_header) if name == TENSORS else (mutate_bytes, mutate_json))
        changed[name] = mutate(dice, changed[name])
    if dice.random() < 0.03:
        del changed[dice.choice(sorted(changed))]
    return changed


# Any bytes


def _flip(dice: random.Random, data: bytearray, at: int) -> None:
    data[at] ^= 1 << dice.randrange(8)


def _overwrite(dice: random.Random, data: bytearray, at: int) -> None:
    run = dice.choice((bytes(8), b"\xff" * 8, dice.randbytes(dice.randint(1, 40)), b'"', b"{", b"\\", b"\r\n"))
    data[at : at + len(run)] = run


def _number(dice: random.Random, data: bytearray, at: int) -> None:
    size = dice.choice((2, 4, 8))
    number = dice.choice((0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 22, 46, len(data)))
    data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")


def _splice(dice: random.Random, data: bytearray, at: int) -> None:
    start = dice.randrange(len(data))
    data[at:at] = data[start : start + dice.choice((1, 4, 30, 300))]


def _cut(dice: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + dice.choice((1, 2, 8, 100))]


def _truncate(dice: random.Random, data: bytearray, at: int) -> None:
    del data[at:]


def _extend(dice: random.Random, data: bytearray, at: int) -> None:
    data += dice.choice((b"\0", b" ", b"\n", dice.randbytes(20), bytes(5000)))


def _prepend(dice: random.Random, data: bytearray, at: int) -> None:
    data[:0] = dice.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"#!/bin/sh\n", dice.randbytes(30)))


DAMAGES = (_flip, _flip, _flip, _overwrite, _overwrite, _number, _splice, _cut, _truncate, _extend, _prepend)


def mutate_bytes(dice: random.Random, content: bytes, reach: int | None = None) -> bytes:
    """One to four damages anywhere, or within the first `reach` bytes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        if data:
            dice.choice(DAMAGES)(dice, data, dice.randrange(min(len(data), reach or len(data))))
    return bytes(data)


# JSON

RAW = (
    *("null", "true", "false", "0", "-1", "1", "1.0", "1.5", "5e0", "1e999", "-1e999", "NaN", "Infinity", "-Infinity"),
    *("2147483648", "9223372036854775808", "18446744073709551616", "-9223372036854775809", "9" * 4000, "9" * 5000),
    *('""', '"x"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"{input}"', '"{input}{input}"', '"\u202e"'),
    *('"../../etc/passwd"', '"' + "x" * 3000 + '"', '"1"', '"NaN"', '"PREFIX_TUNING"', '"LORA"', '"F64"', '"F8_E4M3"'),
    *("[]", "{}", "[[]]", "[1]", '["a"]', "[null]", '{"a": 1, "a": 2}', "[" * 60 + "]" * 60, "[" * 70 + "]" * 70),
    *('{"a":' * 300 + "1" + "}" * 300, "[" * 990 + "]" * 990, "[" * 50_000, "[" + "1," * 2000 + "1]", "01", "1_0"),
    *("'x'", "undefined", "/* */ 1", "1,", "// 1\n1", '"\t"', "\x00", "1]", '1, "peft_type": "CPT"'),
)
"""Values as they are written; some are no JSON."""
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037")


def mutate_json(dice: random.Random, content: bytes) -> bytes:
    """Change, add, rename, double or remove a field anywhere, or the text's encoding."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(dice, content)
    mark = "@@%d@@" % dice.getrandbits(64)  # noqa: UP031
    raw = dice.choice(RAW)
    if not isinstance(value, dict | list) or not value or dice.random() < 0.03:
        return raw.encode(errors="surrogatepass")
    parent = _container(dice, value)
    key = dice.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    match dice.choice(("value", "value", "value", "key", "twin", "remove", "encoding")):
        case "value":
            parent[key] = mark
        case "key" if isinstance(parent, dict):
            parent[dice.choice((mark, "", "__class__", "model_config", "x" * 500, "max_tokens"))] = parent.pop(key)
        case "twin" if isinstance(parent, dict):
            parent[f"{key}{mark}"] = parent[key]
            return json.dumps(value).replace(mark, "").encode()
        case "encoding":
            return json.dumps(value, ensure_ascii=False).encode(dice.choice(ENCODINGS), errors="replace")
        case _:
            del parent[key]
    text = json.dumps(value, ensure_ascii=dice.random() < 0.5).replace(f'"{mark}"', raw)
    return text.encode(errors="surrogatepass")


def _container(dice: random.Random, value: Any) -> Any:
    """An object or list somewhere within that is not empty."""
    while True:
        inner = [item for item in (value.values() if isinstance(value, dict) else value) if item]
        inner = [item for item in inner if isinstance(item, dict | list)]
        if not inner or dice.random() < 0.3:
            return value
        value = dice.choice(inner)


# safetensors

SIZES = (0, 1, 2, 4, 5, 6, 16, 17, 31, 32, 33, 64, 640, 2**31, 2**32, 2**42, 2**53 + 1, 2**62, 2**63, 2**64, -1, -5)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E5M2", "C64", "F4", "f32", "", "X" * 5000)


def mutate_header(dice: random.Random, content: bytes) -> bytes:
    """Let a safetensors header say something else of the same data."""
    length = int.from_bytes(content[:8], "little")
    try:
        header: dict[str, Any] = json.loads(content[8 : 8 + length])
        name = dice.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        entry["shape"], entry["data_offsets"] = list(entry["shape"]), list(entry["data_offsets"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return mutate_bytes(dice, content)
    if dice.random() < 0.2:
        text = mutate_json(dice, json.dumps(header).encode())
        return _with_header(dice, text, content[8 + length :])
    data = _edit_header(dice, header, name, content[8 + length :])
    return _with_header(dice, json.dumps(header).encode(), data)


def _edit_header(dice: random.Random, header: dict[str, Any], name: str, data: bytes) -> bytes:
    """Change what is said of a tensor, or its data, which is answered."""
    entry = header[name]
    match dice.randrange(9):
        case 0:
            entry["dtype"] = dice.choice(DTYPES)
        case 1:
            entry["shape"] = [dice.choice(SIZES) for _ in range(dice.choice((0, 1, 2, 2, 2, 3, 9)))]
        case 2:
            entry["data_offsets"] = [dice.choice(SIZES), dice.choice((*SIZES, len(data)))]
        case 3:  # what it says is true, and it is too large, too small or of another rank
            rows = dice.choice((0, 1, 4, 6, 17, 600))
            entry.update(dtype="F32", shape=[rows, 32], data_offsets=[0, rows * 128])
            return dice.randbytes(rows * 128)
        case 4:
            header[dice.choice(("other", "", "x" * 900, "prompt_embeddings ", "\ud800"))] = entry
        case 5:
            header["__metadata__"] = dice.choice(({}, None, [], {"format": 1}, {"a": {"b": "c"}}, {"x": "y" * 9000}))
        case 6:
            return dice.choice((data[:-1], data + b"\0", data[: len(data) // 2], b"", data * 2))
        case 7:
            return b"\xff" * len(data)  # NaN, in any dtype
        case _:
            entry["dtype"] = dice.choice(("F16", "BF16"))
            entry["data_offsets"][1] = (sum(entry["data_offsets"]) + 1) // 2
            return data[: entry["data_offsets"][1]]
    return data


def _with_header(dice: random.Random, text: bytes, data: bytes) -> bytes:
    text += b" " * dice.choice((0, 0, 1, 3, -len(text) % 8))  # data that is not aligned is as good
    lie = dice.choice((0, 0, 0, 0, 0, 0, 0, 1, -1, 8, 2**20, 2**63))
    return struct.pack("<Q", (len(text) + lie) % 2**64) + text + data


def mutate_tensors(dice: random.Random, content: bytes) -> bytes:
    """Damage the bytes of a safetensors file, mostly in its header: other numbers are just another soft prompt."""
    return mutate_bytes(dice, content, dice.choice((8, 150, 150, None)))


# Zips

NAMES = (
    *(f"../{CONFIG}", f"a/../../{CONFIG}", f"/{CONFIG}", f"..\\{TENSORS}", f"C:\\{CONFIG}", f"C:{CONFIG}", "a" * 300),
    *(f"a/b/{CONFIG}", f"b/{TENSORS}", f"./{MANIFEST}", CONFIG.upper(), f"{CONFIG}/", f"{CONFIG}\0.txt", "", "/", ".."),
    *("notes.txt", "adapter_model.bin", "decoder.pt", "inner.zip", "ü/ß", "\u202e", f"__MACOSX/._{CONFIG}", "con"),
)
FORMATS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}
"""The records of a zip: local header, directory entry, end record; and their lengths without names."""


def make_zip(dice: random.Random, files: Files) -> bytes:
    """Pack files, with odd entries beside them."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # a name that comes twice is one of the oddities
        for name, content in files.items():
            bomb = bytes(2**22) if dice.random() < 0.02 else content
            archive.writestr(_info(dice, dice.choice(("", "", "task/")) + name), bomb)
        for _ in range(dice.choice((0, 0, 0, 1, 1, 2))):
            content = dice.choice((b"", b"x" * 100, buffer.getvalue(), *files.values()))
            archive.writestr(_info(dice, dice.choice(NAMES)), content)
        for i in range(dice.choice((59, 70, 500)) if dice.random() < 0.05 else 0):
            archive.writestr(f"{i}", b"")
        if dice.random() < 0.05:
            archive.comment = dice.randbytes(dice.choice((1, 100, 65_535)))
    return buffer.getvalue()


def _info(dice: random.Random, name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # ZipInfo itself would mend some of them
    info.compress_type = dice.choice((zipfile.ZIP_STORED, *[zipfile.ZIP_DEFLATED] * 8, zipfile.ZIP_BZIP2))
    info.external_attr = dice.choice((*[0o100644] * 12, 0, 0o120777, 0o040755, 0o020666)) << 16
    info.extra = dice.choice((*[b""] * 9, b"\x01\x00\x08\x00" + bytes(8), b"\x01\x00\xff\xff", b"\x99\x99\x02\x00ab"))
    return info


def mutate_zip(dice: random.Random, content: bytes) -> bytes:
    """Damage a zip anywhere, or let its records say something else."""
    match dice.randrange(8):
        case 0:
            return content
        case 1:
            return mutate_bytes(dice, content)
        case 2:
            return mutate_bytes(dice, dice.choice((b"MZ" + bytes(400), content)) + content)  # as self-extractors begin
        case 3:
            return _overlap(content)
        case 4:
            end = content.rfind(b"PK\x05\x06")
            zip64 = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, dice.choice(SIZES) % 2**64, 0)
            return content[:end] + zip64 + b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1) + content[end:]
        case _:
            data = bytearray(content)
            for _ in range(dice.randint(1, 3)):
                _edit_record(dice, data)
            return bytes(data)


def _edit_record(dice: random.Random, data: bytearray) -> None:
    magic = dice.choice(list(FORMATS))
    starts = [at for at in _occurrences(data, magic) if at + FORMATS[magic] <= len(data)]
    if starts:
        at = dice.choice(starts) + dice.randrange(4, FORMATS[magic] - 1, 2)
        if dice.random() < 0.5:
            _number(dice, data, at)
        else:
            data[at : at + 2] = dice.choice(
                (b"\x01\x00", b"\x00\x08", b"\x63\x00", b"\x20\x00", b"\x40\x00", b"\x0e\x00")
            )


def _overlap(content: bytes) -> bytes:
    """All entries lead to the first one's bytes, as in a bomb whose entries share them."""
    data = bytearray(content)
    for at in _occurrences(data, b"PK\x01\x02"):
        data[at + 42 : at + 46] = bytes(4)
    return bytes(data)


def _occurrences(data: bytes | bytearray, magic: bytes) -> list[int]:
    found, at = [], data.find(magic)
    while at >= 0:
        found.append(at)
        at = data.find(magic, at + 1)
    return found
