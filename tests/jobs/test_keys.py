from __future__ import annotations

from pathlib import Path

import pytest

from server.engine.model.frozen import FrozenModel
from server.jobs.job import JobState
from server.keys import live
from server.keys.file import add_key, revoke_key
from server.keys.key import Scope
from server.keys.live import ApiKeys
from server.settings import Settings
from tests.jobs.support import SLEEP, by_hand, finished, running, spec, stubbed


@pytest.fixture
def keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.0)
    add_key(tmp_path / "keys.json", "admin", [Scope.ADMIN], None)
    return tmp_path / "keys.json"


@pytest.mark.parametrize("when", ["before it starts", "while it runs", "before it publishes"])
def test_a_job_of_a_revoked_key_ends_with_a_sentence_and_publishes_nothing(
    settings: Settings, tiny32: FrozenModel, result: str, keys_file: Path, when: str
) -> None:
    yard = stubbed(settings, tiny32, SLEEP if when == "while it runs" else result)
    key, _ = add_key(keys_file, "team", [Scope.PUBLISH], ["mo*"])
    yard.job_queue.keys = ApiKeys(keys_file)
    job = yard.submit(spec(), by=key.id)
    with by_hand(yard):
        if when != "before it starts":
            yard.runner._turn()
        if when == "before it publishes":
            finished(yard)
        revoke_key(keys_file, key.id)
        yard.runner._turn()
        assert yard.runner._running is None
    ended = yard.job_queue.job(job.id)
    assert ended.status.state == JobState.FAILED
    assert ended.status.error is not None
    assert ended.status.error.code == "forbidden"
    assert ended.status.error.error.startswith(f"The key {key.id} was revoked.")
    assert yard.registry.num_tasks == 0


@pytest.mark.parametrize(
    ("scopes", "tasks", "part"),
    [([Scope.GENERATE], None, "no longer has the scope publish"), ([Scope.PUBLISH], ["x"], "no longer for the task")],
)
def test_a_job_whose_key_lost_what_it_needs_publishes_nothing(
    settings: Settings,
    tiny32: FrozenModel,
    result: str,
    keys_file: Path,
    scopes: list[Scope],
    tasks: list[str] | None,
    part: str,
) -> None:
    yard = stubbed(settings, tiny32, result)
    key, _ = add_key(keys_file, "team", scopes, tasks)  # as an operator has left it in the meantime
    yard.job_queue.keys = ApiKeys(keys_file)
    job = yard.submit(spec(), by=key.id)
    with running(yard):
        ended = yard.ended(job)
    assert ended.status.error is not None
    assert part in ended.status.error.error
    assert yard.registry.num_tasks == 0
