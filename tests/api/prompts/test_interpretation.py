"""Interpretation over HTTP: what `prelude inspect` says, off the event loop, computed once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from server.api.prompts import interpretation
from server.api.prompts.interpretation import Interpretations
from server.engine.worker import EngineWorker
from server.errors import Overloaded
from server.executors import Executors
from server.interpret.results import Interpretation
from server.interpret.static import Interpreter
from server.keys.file import add_key
from server.keys.key import Scope
from server.settings import Settings
from tests.api.live import LiveServer, as_form, assert_error, live_server
from tests.support import make_engine, random_soft_prompt, tiny_model


def test_an_interpretation_is_that_of_the_shell(server: LiveServer) -> None:
    soft_prompt = server.publish_random(
        "read", manifest={"training": {"start": {"initial_token_ids": [5, 6, 7, 8, 9]}}}
    )
    reply = server.client.get("/prompts/read/interpretation", params={"top": 3})
    assert reply.status_code == 200, reply.text
    expected = Interpreter(server.model).interpret("read", soft_prompt, top=3)
    found = Interpretation.model_validate(reply.json())
    assert found.start_is_known
    assert found.verdict == expected.verdict
    assert found.prefix_hash == soft_prompt.prefix_hash
    assert found.nearest is not None
    assert [len(token.learned) for token in found.nearest.tokens] == [3] * soft_prompt.num_virtual_tokens


def test_an_older_version_is_interpreted_on_request(server: LiveServer) -> None:
    first = server.publish_random("read-again", seed=1)
    second = server.publish_random("read-again", seed=2)
    url = "/prompts/read-again/interpretation"
    assert server.client.get(url).json()["digest"] == second.digest
    assert server.client.get(url, params={"version": 1}).json()["digest"] == first.digest


def test_a_start_that_is_not_declared_gives_no_verdict(server: LiveServer) -> None:
    server.publish_random("foreign")
    found = server.client.get("/prompts/foreign/interpretation").json()
    assert not found["start_is_known"]
    assert found["verdict"].startswith("The start is unknown")
    assert found["lens"] is None


def test_the_soft_prompt_that_training_began_with_is_looked_up_off_the_event_loop(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = server.publish_random("begun-from", seed=3)
    start = {"training": {"start": {"prefix_hash": first.prefix_hash}}}
    server.publish_random("begun", seed=4, manifest=start)
    server.publish_random("begun-lost", seed=5, manifest={"training": {"start": {"prefix_hash": "0" * 64}}})
    looks: list[str] = []
    true = server.registry.tasks_with

    def tasks_with(prefix_hash: str) -> list[str]:
        looks.append(threading.current_thread().name)
        return true(prefix_hash)

    monkeypatch.setattr(server.registry, "tasks_with", tasks_with)
    monkeypatch.setattr(server.registry, "tasks", lambda: pytest.fail("a walk over all tasks"))
    found = server.client.get("/prompts/begun/interpretation").json()
    assert found["start_is_known"]
    assert found["start"].startswith(f"the soft prompt {first.prefix_hash[:12]}")
    assert looks == ["in-server-jobs"]
    assert not server.client.get("/prompts/begun-lost/interpretation").json()["start_is_known"]
    assert len(looks) == 1, "what no version has is not looked for"


def test_what_cannot_be_interpreted_is_refused_with_a_reason(server: LiveServer) -> None:
    server.publish_random("refused")
    url = "/prompts/refused/interpretation"
    assert_error(server.client.get("/prompts/nobody/interpretation"), 404, "unknown_task")
    assert_error(server.client.get(url, params={"version": 9}), 404, "unknown_task")
    assert_error(server.client.get(url, params={"top": 21}), 422, "invalid_request", "top")
    assert_error(server.client.get(url, params={"version": 0}), 422, "invalid_request", "version")
    assert_error(server.client.get(url, params={"topp": 2}), 422, "invalid_request", "topp", "top")


def test_a_soft_prompt_is_interpreted_once_while_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []
    model = tiny_model()
    true = Interpreter.interpret

    def counted(*args: object, **options: object) -> Interpretation:
        calls.append(1)
        return true(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Interpreter, "interpret", counted)
    monkeypatch.setattr(interpretation, "MOST_KEPT", 2)
    one, two, three = (random_soft_prompt(model.spec, 2, seed=seed) for seed in range(3))

    async def ask() -> None:
        found = Interpretations(Settings.load(cache_dir=tmp_path), EngineWorker(make_engine(model)), Executors())
        await asyncio.gather(*(found.of(name, one) for name in "abc"))
        assert len(calls) == 1
        assert (await found.of("renamed", one)).task == "renamed"
        await found.of("b", two)
        await found.of("c", three)
        assert len(calls) == 3
        await found.of("a", one)
        assert len(calls) == 4, "the oldest is forgotten"
        monkeypatch.setattr(interpretation, "WAIT_SECONDS", 0.0)
        with pytest.raises(Overloaded, match="longer than"):
            await found.of("d", one, top=2)

    asyncio.run(ask())


def test_an_interpretation_needs_the_scope_of_a_download(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, admin = add_key(path, "admin", [Scope.ADMIN], None)
    _, reader = add_key(path, "reader", [Scope.GENERATE], None)
    _, other = add_key(path, "other", [Scope.PUBLISH], ["team-*"])
    with live_server(tmp_path, api_keys_file=path) as live:

        def headers(key: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {key}"}

        files = as_form(live.files(random_soft_prompt(live.model.spec, 2)))
        assert live.client.put("/prompts/mine", files=files, headers=headers(admin)).status_code == 201
        url = "/prompts/mine/interpretation"
        assert live.client.get(url, headers=headers(admin)).status_code == 200
        assert_error(live.client.get(url, headers=headers(reader)), 403, "forbidden", "publish")
        assert_error(live.client.get(url, headers=headers(other)), 403, "forbidden", "team-*")
