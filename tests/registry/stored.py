"""Objects as tests store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.registry.objects import Objects

EVENT = "events/000000000001.json"


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


BLOB = "blobs/0123abc-4567.safetensors"
Open = Callable[[], Objects]
