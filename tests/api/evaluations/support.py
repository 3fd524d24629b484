"""Evaluations as clients ask for them."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.live import LiveServer, wait_until

LABELS = ["no", "yes"]
MANIFEST = {"labels": LABELS, "input_template": "{input}\n", "generation": {"max_new_tokens": 4}}
PAIRS = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no"), ("great", "yes"), ("grim", "no")]


def jsonl(*pairs: tuple[str, str]) -> bytes:
    return "".join(json.dumps({"input": text, "target": target}) + "\n" for text, target in pairs).encode()


def start(server: LiveServer, rows: bytes = jsonl(*PAIRS), headers: Any = None, **fields: Any) -> httpx.Response:
    shots = fields.pop("shots", None)
    files = {"data": ("test.jsonl", rows), **({} if shots is None else {"shots": ("train.jsonl", shots)})}
    return server.client.post("/evaluations", data=fields, files=files, headers=headers)


def finished(server: LiveServer, reply: httpx.Response, headers: Any = None) -> dict[str, Any]:
    """An evaluation that was accepted, once it has ended."""
    assert reply.status_code == 202, reply.text
    path = f"/evaluations/{reply.json()['id']}"
    assert reply.headers["location"] == path

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = server.client.get(path, headers=headers).json()
        return found

    wait_until(lambda: "ended_at" in shown(), 120)
    return shown()
