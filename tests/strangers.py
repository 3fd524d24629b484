"""Servers that are not ours, for what asks a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.client import PreludeClient
from tests.api.live import serving


@contextmanager
def answering(app: ASGIApp) -> Iterator[PreludeClient]:
    """A client of something that is not our server."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none")
    with serving(config) as port, PreludeClient(f"http://127.0.0.1:{port}") as connected:
        yield connected


def reply(status: int, body: bytes, **headers: str) -> ASGIApp:
    """An app that answers everything alike."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    return app
