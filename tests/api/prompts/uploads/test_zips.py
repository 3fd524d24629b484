from __future__ import annotations

import io
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
from fastapi import UploadFile

from server.api.prompts.uploads import unpack_upload
from server.errors import InvalidSoftPrompt
from tests.api.live import (
    MAX_UPLOAD_BYTES,
    Files,
    LiveServer,
    assert_error,
    zip_of,
)
from tests.api.prompts.uploads.support import CONFIG, LIVE, MANIFEST, TENSORS, refused, zip_file


@pytest.mark.parametrize(
    "name",
    [
        f"../{CONFIG}",
        f"a/../../{CONFIG}",
        f"/{CONFIG}",
        f"/etc/{CONFIG}",
        f"..\\{CONFIG}",
        f"C:{CONFIG}",
        f"C:\\{CONFIG}",
        "../../evil",
        "/etc/passwd",
    ],
)
def test_a_zip_entry_that_leads_outside_is_refused(server: LiveServer, good: Files, name: str) -> None:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # ZipInfo itself would mend some of them
    refused(server, {"f.zip": zip_file([*good.items(), (info, b"{}")])}, "outside its folder")


def test_a_zip_with_a_link_is_refused(server: LiveServer, good: Files) -> None:
    for mode in (0o120777, 0o020666, 0o010644):  # a link, a device, a pipe
        link = zipfile.ZipInfo(TENSORS)
        link.external_attr = mode << 16
        entries: list[tuple[zipfile.ZipInfo | str, bytes]] = [(CONFIG, good[CONFIG]), (link, b"/etc/passwd")]
        refused(server, {"f.zip": zip_file(entries)}, "has a link or a device", TENSORS)


def test_a_zip_bomb_is_refused_while_it_unfolds(server: LiveServer, good: Files) -> None:
    bomb = zip_of({CONFIG: good[CONFIG], TENSORS: bytes(64 * MAX_UPLOAD_BYTES)})
    assert len(bomb) < MAX_UPLOAD_BYTES / 10
    assert_error(server.put(LIVE, {"f.zip": bomb}), 413, "payload_too_large", "unpacked files")


def test_a_zip_that_lies_about_a_size_is_refused(server: LiveServer, good: Files) -> None:
    real = len(good[TENSORS])
    honest = zip_of({TENSORS: good[TENSORS], CONFIG: good[CONFIG]})
    for claim in (0, 8, real - 1):
        lying = honest.replace(struct.pack("<I", real), struct.pack("<I", claim))
        assert lying != honest
        refused(server, {"f.zip": lying})
    for claim in (real + 1, 2**31):  # more than there is: either refused, or what there is, which is live already
        lying = honest.replace(struct.pack("<I", real), struct.pack("<I", claim))
        assert server.put(LIVE, {"f.zip": lying}).status_code in (200, 422)
    size = 8 * MAX_UPLOAD_BYTES
    bomb = zip_of({TENSORS: bytes(size), CONFIG: good[CONFIG]})
    assert_error(server.put(LIVE, {"f.zip": bomb}), 413, "payload_too_large")
    for claim in (100, size // 16):
        lying = bomb.replace(struct.pack("<I", size), struct.pack("<I", claim))
        assert lying != bomb
        refused(server, {"f.zip": lying})


def test_an_encrypted_zip_is_refused(server: LiveServer, good: Files) -> None:
    encrypted = bytearray(zip_of(good))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := encrypted.find(magic, start + 1)) >= 0:
            encrypted[start + offset] |= 1
    refused(server, {"f.zip": bytes(encrypted)}, "The zip is encrypted.")


def test_a_zip_with_too_many_entries_is_refused(server: LiveServer, good: Files) -> None:
    many = {**good, **{f"notes/{i}": b"" for i in range(100)}}
    refused(server, {"f.zip": zip_of(many)}, f"{len(many)} entries")


def test_a_zip_whose_directory_is_huge_is_refused_before_it_is_read(server: LiveServer, good: Files) -> None:
    many = zip_file([(f"{i}", b"") for i in range(3_000)], zipfile.ZIP_STORED)
    packed = zip_of(good)
    end = packed.rfind(b"PK\x05\x06")
    zip64 = packed[:end] + b"PK\x06\x07" + bytes(16) + packed[end:]  # points to a record that may say anything
    for content in (many, zip64):
        refused(server, [("x.zip", content)], "at most 64")


def test_a_zip_entry_at_an_impossible_offset_is_refused(server: LiveServer, good: Files) -> None:
    packed = bytearray(zip_of(good))
    at = packed.rfind(b"PK\x01\x02")
    packed[at + 42 : at + 46] = b"\xff\xff\xff\xff"
    refused(server, [("x.zip", bytes(packed))], "zip")


def test_a_zip_entry_without_a_name_is_no_error_of_the_server(server: LiveServer, good: Files) -> None:
    nameless = zipfile.ZipInfo("placeholder")
    nameless.filename = ""
    assert server.put(LIVE, {"f.zip": zip_file([*good.items(), (nameless, b"x")])}).status_code in (200, 422)


def test_a_large_zip_with_an_impossible_offset_is_refused_too(tmp_path: Path, good: Files) -> None:
    # Over 1 MB an upload is a file, whose seek raises OSError where that of a smaller one's buffer raises ValueError.
    packed = bytearray(zip_of(good))
    end = packed.rfind(b"PK\x05\x06")
    packed[end + 16 : end + 20] = struct.pack("<I", end + 2000)  # the directory began before the zip does
    with tempfile.TemporaryFile() as file:
        file.write(packed)
        with pytest.raises(InvalidSoftPrompt, match="cannot be read"):
            unpack_upload([UploadFile(file, filename="x.zip")], tmp_path, MAX_UPLOAD_BYTES)


def test_entries_that_share_their_bytes_are_counted_as_often_as_they_are_taken(tmp_path: Path, good: Files) -> None:
    # One kernel of bytes, named by every entry: what unfolds is what is taken, and each name is taken once.
    packed = bytearray(zip_of({CONFIG: bytes(1000), TENSORS: b"", MANIFEST: b""}))
    at = -1
    while (at := packed.find(b"PK\x01\x02", at + 1)) >= 0:
        packed[at + 42 : at + 46] = bytes(4)
    with pytest.raises(InvalidSoftPrompt, match="cannot be read"):
        unpack_upload([UploadFile(io.BytesIO(packed), filename="x.zip")], tmp_path, MAX_UPLOAD_BYTES)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_packed_in_a_rare_way_is_refused(server: LiveServer, good: Files, compression: int) -> None:
    refused(server, {"f.zip": zip_file(list(good.items()), compression)}, "rare compression")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a zip" * 100, zip_of({"x": b"y"})[:-30]], ids=["empty", "begun", "text", "cut"]
)
def test_what_is_not_a_zip_is_refused(server: LiveServer, content: bytes) -> None:
    refused(server, {"f.zip": content}, "zip cannot be read")


def test_a_zip_without_the_files_is_refused(server: LiveServer) -> None:
    refused(server, {"f.zip": zip_of({})}, f"{CONFIG} is missing")
    refused(server, {"f.zip": zip_of({"notes.txt": b"hello"})}, f"{CONFIG} is missing")
