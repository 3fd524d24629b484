"""Neither a key nor what a user writes is ever logged, at whatever level."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli.logs import Form, formatter
from server.keys import live as live_keys
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, as_form, live_server
from tests.support import random_soft_prompt

TEXT = "my-very-own-words"
TOKEN = "hf_my-very-own-token"
CLIENTS = ("httpx", "httpcore")


MISSPELT: dict[str, Any] = {TEXT: 1}
"""A field that there is not."""


def test_neither_keys_nor_texts_are_logged_through_good_and_bad_requests(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "keys.json"
    text = add_key(path, "ci", [Scope.ADMIN], None)[1]
    limited = add_key(path, "team", [Scope.GENERATE], ["team-*"])[1]
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(live_keys, "LOOK_SECONDS", 0.0)
    with live_server(tmp_path, api_keys_file=path, log_level="debug") as live:
        good = {"Authorization": f"Bearer {text}"}
        soft_prompt = random_soft_prompt(live.model.spec, manifest={"input_template": TEXT + " {input}"})
        files = as_form(live.files(soft_prompt))
        statuses = [live.client.put("/prompts/mood", files=files, headers=good).status_code]
        statuses += [*_native_requests(live, text, limited), *_openai_requests(live, good)]
        broken = {"Content-Type": "application/json", **good}
        statuses.append(live.client.post("/generate", content=f'{{"inputs": "{TEXT}', headers=broken).status_code)
        form = as_form({"adapter_config.json": b"{" + TEXT.encode(), "adapter_model.safetensors": TEXT.encode()})
        statuses.append(live.client.put("/prompts/mood", files=form, headers=good).status_code)
        live.model.fail_after = 0
        statuses += _send(live, text)
        path.write_text(f'{{"keys": "{text}"}}')
        live.client.get("/info", headers=good)
        monkeypatch.setattr(live.registry, "resolve", None)  # what nobody expected
        with httpx.Client(base_url=live.url) as client:  # uvicorn closes the connection after it
            response = client.post("/generate?task=mood", json={"inputs": TEXT}, headers=good)
            statuses.append(response.status_code)
    assert {200, 201, 401, 403, 404, 422, 500} <= set(statuses)
    ours = "\n".join(
        f"{record.getMessage()}\n{record.exc_text or ''}" for record in caplog.records if not _is_clients(record.name)
    )
    for expected in ("the device is gone", "not callable", "The keys that were read before stay valid."):
        assert expected in ours, "the log was not looked at"
    forms: tuple[Form, ...] = ("console", "json")
    records = [record for record in caplog.records if not _is_clients(record.name)]
    assert sum(record.getMessage() == "request" for record in records) > 20, "the lines of requests were not looked at"
    written = [formatter(form).format(record) for form in forms for record in records]
    seen = ours + "\n".join(written) + "".join(capfd.readouterr())
    for hidden in (text, text.split("_")[2], limited, TOKEN, TEXT):
        assert hidden not in seen


def _send(live: LiveServer, key: str | None, inputs: Any = TEXT, query: str = "", **parameters: Any) -> Iterator[int]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 3, **parameters}}
    for route in ("/generate", "/generate_stream"):
        yield live.client.post(route + query, json=body, headers=headers).status_code


def _native_requests(live: LiveServer, text: str, limited: str) -> Iterator[int]:
    """Statuses of good and bad requests to /generate, with the text wherever a request can hold one."""
    yield from _send(live, text)
    yield from _send(live, text, query="?task=mood")
    yield from _send(live, text, stop=[TEXT])
    for key in (None, TOKEN, text + "0", limited):
        yield from _send(live, key)
    yield from _send(live, text, query="?task=nobody")
    yield from _send(live, text, [TEXT])
    yield from _send(live, text, TEXT * 10_000)
    yield from _send(live, text, temperature=TEXT)
    yield from _send(live, text, **MISSPELT)


def _openai_requests(live: LiveServer, headers: dict[str, str]) -> Iterator[int]:
    """Statuses of good and bad requests under /v1, likewise."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": TEXT},
        "/v1/chat/completions": {"messages": [_message(TEXT)]},
    }
    extras: list[dict[str, Any]] = [{}, {"stream": True}, {"stop": [3]}, {"model": TEXT}, MISSPELT]
    for route, body in asked.items():
        for more in extras:
            content = {"model": "mood", "max_tokens": 3, **body, **more}
            yield live.client.post(route, json=content, headers=headers).status_code


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _is_clients(logger: str) -> bool:
    return logger.split(".")[0] in CLIENTS
