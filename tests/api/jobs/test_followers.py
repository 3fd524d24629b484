"""Followers of training jobs: one look at a job's folder serves them all, and each gets everything once."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.api.jobs import followers as module
from server.api.jobs.followers import Followers
from server.api.jobs.job_kind import Site as ServerSite
from server.api.training.routes import TrainingJobs
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import Overloaded, ServerDraining, UnknownJob
from server.executors import Executors
from server.jobs.job import Job, JobState
from server.jobs.progress_log import Recorder
from server.settings import Settings
from server.train.config import TrainingConfig
from tests.jobs.support import Yard, make_yard, spec

Event = Mapping[str, Any]


@pytest.fixture
def yard(tmp_path: Any, tiny32: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Yard:
    """A queue whose jobs nobody runs."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    return make_yard(Settings.load(prompts_dir=tmp_path / "prompts"), tiny32)


class Site:
    """Followers of a yard's jobs, as the app has them."""

    def __init__(self, yard: Yard) -> None:
        self.worker = SimpleNamespace(draining=False)
        worker = cast(EngineWorker, self.worker)
        self.followers = Followers(worker)
        self.jobs = TrainingJobs(ServerSite(yard.settings, worker, Executors(), yard.job_queue, None))

    async def all_events(self, job: Job, last: int = 0) -> list[Event]:
        return [event async for event in self.followers.events(self.jobs, job.id, last)]


def ends(yard: Yard, job: Job) -> None:
    yard.files(job).write_status(replace(yard.job_queue.job(job.id).status, state=JobState.SUCCEEDED))


def record(yard: Yard, job: Job, *steps: int) -> None:
    recorder = Recorder(yard.files(job).record, TrainingConfig(steps=100))
    for step in steps:
        recorder.step(step, 1.0, 1.0, None)
    recorder.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_a_job_that_many_follow_is_looked_at_as_often_as_for_one(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    job, looks = yard.submit(spec()), 0
    read = yard.job_queue.files.job

    def counted(job_id: str) -> Job:
        nonlocal looks
        looks += 1
        return read(job_id)

    monkeypatch.setattr(yard.job_queue.files, "job", counted)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)

    async def follow() -> None:
        nonlocal looks
        site = Site(yard)
        following = [asyncio.ensure_future(site.all_events(job)) for _ in range(40)]
        await asyncio.sleep(0.5)
        assert 1 <= looks <= 8, "40 followers would look 200 times"
        record(yard, job, 1, 2, 3)
        await asyncio.sleep(0.3)
        record(yard, job, 4)
        ends(yard, job)
        events = await asyncio.gather(*following)
        assert all(found == events[0] for found in events)
        assert [event["step"] for event in events[0] if event.get("event") == "step"] == [1, 2, 3, 4]
        assert [event["id"] for event in events[0] if "id" in event] == [1, 2, 3, 4]
        assert [event.get("state") for event in events[0] if event["event"] == "state"] == ["queued", "succeeded"]
        assert events[0][-1]["event"] == "end"
        assert not site.followers._watches, "nobody looks any more"

    run(follow())


def test_one_who_comes_late_or_again_gets_what_is_missing_and_nothing_twice(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 300)  # two lines at once
    job = yard.submit(spec())
    record(yard, job, *range(1, 31))

    async def follow() -> None:
        site = Site(yard)
        first = asyncio.ensure_future(site.all_events(job))
        await asyncio.sleep(0.2)
        record(yard, job, *range(31, 41))
        await asyncio.sleep(0.2)
        again = asyncio.ensure_future(site.all_events(job, 35))
        await asyncio.sleep(0.2)
        ends(yard, job)
        assert [event["id"] for event in await first if "id" in event] == list(range(1, 41))
        assert [event["id"] for event in await again if "id" in event] == list(range(36, 41))
        after = await site.all_events(job)
        assert [event["step"] for event in after if "id" in event] == list(range(1, 41))

    run(follow())


def test_a_bounded_number_follows(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FOLLOWERS", 1)
    job = yard.submit(spec())

    async def follow() -> None:
        site = Site(yard)
        first = asyncio.ensure_future(site.all_events(job))
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="1 clients follow"):
            await site.all_events(job)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        ends(yard, job)
        assert (await site.all_events(job))[-1]["event"] == "end"

    run(follow())


def test_followers_are_told_when_the_folder_vanishes_or_the_server_drains(yard: Yard) -> None:
    jobs = [yard.submit(spec()) for _ in range(2)]

    async def follow() -> None:
        site = Site(yard)
        following = [asyncio.ensure_future(site.all_events(job)) for job in jobs]
        await asyncio.sleep(0.1)
        shutil.rmtree(yard.files(jobs[0]).path)
        with pytest.raises(UnknownJob):
            await following[0]
        site.worker.draining = True
        with pytest.raises(ServerDraining):
            await following[1]

    run(follow())


def test_a_quiet_stream_is_kept_open_by_comments(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.05)
    job = yard.submit(spec())

    async def follow() -> None:
        site = Site(yard)
        following = asyncio.ensure_future(site.all_events(job))
        await asyncio.sleep(0.5)
        ends(yard, job)
        assert {} in await following

    run(follow())
