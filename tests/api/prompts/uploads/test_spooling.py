from __future__ import annotations

import contextlib
import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server.api.prompts import uploads
from server.api.prompts.uploads import unpacked_upload
from server.errors import StoreError, StoreFull
from tests.api.live import (
    Files,
    LiveServer,
    assert_error,
    live_server,
    wait_until,
    zip_of,
)
from tests.api.prompts.uploads.support import CONFIG, TENSORS

SPOOLED = 2**20
"""Bytes of a file from which on Starlette keeps it on disk."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for open files without a name")


def _open_temporary_files() -> list[str]:
    """Open files in the temporary folder; those of Starlette have no name there."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    return [link for link in links if link.startswith(tempfile.gettempdir())]


@pytest.fixture
def roomy_server(tmp_path: Path) -> Iterator[LiveServer]:
    """One that takes uploads that are large enough to be spooled."""
    with live_server(tmp_path / "roomy", max_upload_bytes=64 * 2**20) as live:
        yield live


def _junk(size: int) -> Iterator[bytes]:
    """A form whose tensor file has the given size and is not valid."""
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % CONFIG.encode()
    yield b'{"peft_type": "CPT"}\r\n'
    yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % TENSORS.encode()
    for _ in range(size // 2**16):
        yield bytes(2**16)
    yield b"\r\n--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def test_an_upload_goes_to_disk_and_not_into_memory(roomy_server: LiveServer) -> None:
    process = psutil.Process()
    assert roomy_server.client.put("/prompts/x", content=_junk(2 * SPOOLED), headers=FORM).status_code == 422
    before, peak = process.memory_info().rss, 0

    def watched() -> Iterator[bytes]:
        nonlocal peak
        for piece in _junk(60 * 2**20):
            peak = max(peak, process.memory_info().rss)
            yield piece

    response = roomy_server.client.put("/prompts/x", content=watched(), headers=FORM)
    peak = max(peak, process.memory_info().rss)
    assert_error(response, 422, "invalid_soft_prompt", "not a safetensors file")
    assert peak - before < 20 * 2**20


@needs_proc
def test_its_room_on_disk_is_free_again_after_success_and_refusal(roomy_server: LiveServer, good: Files) -> None:
    readme = {"README.md": bytes(2 * SPOOLED)}
    assert roomy_server.put("roomy", {**good, **readme}).status_code == 201
    wait_until(lambda: _open_temporary_files() == [])  # FastAPI closes them behind the reply
    assert roomy_server.client.put("/prompts/roomy", content=_junk(2 * SPOOLED), headers=FORM).status_code == 422
    wait_until(lambda: _open_temporary_files() == [])
    assert roomy_server.client.put("/prompts/roomy", content=_junk(80 * 2**20), headers=FORM).status_code == 413
    wait_until(lambda: _open_temporary_files() == [])


@needs_proc
def test_its_room_on_disk_is_free_again_when_the_client_goes_away(roomy_server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", roomy_server.port), timeout=5) as connection:
        head = "PUT /prompts/roomy HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: {FORM['Content-Type']}\r\n\r\n".encode())
        for piece in list(_junk(3 * SPOOLED))[:-1]:
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        wait_until(lambda: len(_open_temporary_files()) == 1)
    wait_until(lambda: _open_temporary_files() == [])
    assert roomy_server.client.get("/health").status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_a_body_is_told_as_such(
    roomy_server: LiveServer, good: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda *a, **k: open("/dev/full", "w+b", buffering=0))  # noqa: PTH123, SIM115
        for content in (_junk(2 * SPOOLED), b"".join(_junk(2 * SPOOLED))):
            response = roomy_server.client.put("/prompts/roomy", content=content, headers=FORM)
            assert "TMPDIR" in assert_error(response, 507, "store_full", "No space left")["remedy"]
    assert roomy_server.put("roomy", good).status_code == 201


def test_a_full_disk_under_the_files_is_told_as_such(
    server: LiveServer, good: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "copy_within", full)
        for files in (good, {"f.zip": zip_of(good)}):
            assert_error(server.put("uploads-never", files), 507, "store_full", "No space left")


def test_a_temporary_folder_that_is_missing_is_the_servers_error(
    good: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(StoreError, match="No such file") as caught, unpacked_upload([], 1000):
            pass
    assert not isinstance(caught.value, StoreFull)
    assert caught.value.status == 500
