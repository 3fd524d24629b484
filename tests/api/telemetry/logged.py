"""What a server logs, as `prelude serve` would write it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.cli.logs import Form, formatter


class Log:
    """Entries so far."""

    def __init__(self) -> None:
        self._stream = io.StringIO()

    @property
    def text(self) -> str:
        """All of it."""
        return self._stream.getvalue()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All entries of the server, if they are JSON; clients log in the same process."""
        found = [json.loads(line) for line in self.text.splitlines()]
        return [entry for entry in found if entry["logger"].split(".")[0] not in ("httpx", "httpcore")]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The lines that requests end with."""
        return [entry for entry in self.entries if entry["event"] == "request"]


@contextmanager
def logged(form: Form = "json", level: int = logging.INFO) -> Iterator[Log]:
    """Follow the log while the block runs."""
    log, root = Log(), logging.getLogger()
    handler, before = logging.StreamHandler(log._stream), root.level
    handler.setFormatter(formatter(form))
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # another test's server may have configured them
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    try:
        yield log
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
