"""Requests under /v1, as a program without a library sends them."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.live import (
    LiveServer,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
FROZEN = "tiny-llama"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.name }}{{ m.content }}\n{% endfor %}<assistant>"
"""A chat template that shows all that it is given."""

Body = dict[str, Any]


def user(text: str) -> list[Body]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    """A request that may be refused."""
    if path == CHAT and "messages" not in body:
        body = {"messages": user("hello"), **body}
    elif path == COMPLETIONS and "prompt" not in body:
        body = {"prompt": "hello", **body}
    return server.client.post(path, json={"model": FROZEN, **body})


def ask(server: LiveServer, path: str = COMPLETIONS, **body: Any) -> Body:
    """The reply to a request that must be answered."""
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    reply: Body = response.json()
    return reply


def texts(reply: Body) -> list[str]:
    """The texts of a reply, in its order."""
    return [c["text"] if "text" in c else c["message"]["content"] for c in reply["choices"]]


def stream(server: LiveServer, path: str = COMPLETIONS, **body: Any) -> list[Body]:
    """The chunks of a stream that must come to its end."""
    *chunks, last = events(post(server, path, stream=True, **body))
    assert last == "[DONE]"
    assert all("error" not in chunk for chunk in chunks)
    return chunks


def events(response: httpx.Response) -> list[Any]:
    """What a stream's events hold, after checking that it is nothing but events."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *parts, rest = response.content.split(b"\n\n")
    assert rest == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    values = [part.removeprefix(b"data: ").decode() for part in parts]
    return [value if value == "[DONE]" else json.loads(value) for value in values]


def joined(chunks: list[Body]) -> dict[int, str]:
    """The texts of a stream by their index."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]] = found.get(choice["index"], "") + text
    return found


def reasons(chunks: list[Body]) -> list[tuple[int, str]]:
    """Which choices of a stream ended, and why, in the order of their ends."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"] is not None]


RENDERED = "<user>hello\n<assistant>"


def engine_ids(server: LiveServer, model: str, count: int) -> list[int]:
    """The token ids that a greedy answer consists of."""
    task = None if model == FROZEN else model
    reply = server.generate("hello", task, max_new_tokens=count, ignore_eos_token=True, details=True)
    return [token["id"] for token in reply.json()["details"]["tokens"]]


ROUTES = (COMPLETIONS, CHAT)
