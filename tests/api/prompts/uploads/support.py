"""What tests of uploads share."""

from __future__ import annotations

import io
import zipfile

from tests.api.live import (
    Files,
    LiveServer,
    as_form,
    assert_error,
)

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
LIVE = "uploads-live"


def state_of(server: LiveServer) -> object:
    store = server.settings.prompts_dir / ".store"
    return (
        server.client.get("/prompts", params={"limit": 1000}).json(),
        server.text("hello", LIVE, max_new_tokens=4),
        {path: path.stat().st_mtime_ns for path in sorted(store.rglob("*")) if path.is_file()},
    )


def refused(server: LiveServer, files: Files | list[tuple[str, bytes]], *parts: str, code: str = "") -> None:
    """Uploaded over a live task and under a new name, both are refused with these words."""
    for task in (LIVE, "uploads-never"):
        response = server.client.put(f"/prompts/{task}", files=as_form(files))
        assert_error(response, 422, code or "invalid_soft_prompt", *parts)


def zip_file(entries: list[tuple[zipfile.ZipInfo | str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()
