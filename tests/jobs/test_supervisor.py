"""Jobs in real processes: they publish through the one path, end when asked to, and survive whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.errors import JobRuns, UnknownJob
from server.jobs.folder import JobFolder
from server.jobs.job import ActivateIf, Job, JobState
from server.jobs.launcher import write_order
from server.jobs.process_main import main
from server.jobs.progress_log import read_lines
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from server.train.inputs import TaskFiles
from server.train.output import write_task
from server.train.train_task import train_task
from tests.api.live import wait_until
from tests.jobs.support import LEARNS, ROWS, SECONDS, SLOW, Yard, make_yard, running, spec
from tests.registry.fakes import MemoryObjects
from tests.support import weights_hash
from tests.train.rows import MOODS, write_rows

LONG = LEARNS | {"steps": 80, "evaluations": 16, "learning_rate": 0.05}
"""Long enough to be killed on the way, with a checkpoint every ten steps."""


def process_of(yard: Yard, job: Job) -> int:
    """The job's process, once it has left checkpoints."""
    wait_until(lambda: yard.job_queue.job(job.id).progress.step >= 30, SECONDS)
    pid = yard.job_queue.job(job.id).status.pid
    assert pid is not None
    return pid


def stubbed(settings: Settings, model: FrozenModel, code: str, registry: Registry | None = None) -> Yard:
    """A yard whose processes do this instead of training; `folder` is the job's."""

    def start(folder: JobFolder, settings: Settings) -> subprocess.Popen[bytes]:
        head = f"import os, shutil, signal, sys, time, pathlib; folder = pathlib.Path({str(folder.path)!r})\n"
        return subprocess.Popen([sys.executable, "-c", head + code])

    return make_yard(settings, model, registry, start)


@pytest.fixture(scope="module")
def learned(tiny32: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Code that leaves the result of a job at once, of one that has learned MOODS."""
    folder = tmp_path_factory.mktemp("learned")
    files = TaskFiles("mood", write_rows(folder / "data", ROWS), write_rows(folder / "held", MOODS))
    write_task(folder / "result", train_task(tiny32, files, spec().config), tiny32.spec)
    return f"shutil.copytree({str(folder / 'result')!r}, folder / 'result')\n"


def test_a_job_publishes_through_the_one_path_and_answers_if_its_bound_is_kept(
    settings: Settings, tiny32: FrozenModel, learned: str
) -> None:
    kept = ActivateIf(metric="validation_exact_match", at_least=0.9)
    missed = ActivateIf(metric="validation_loss", at_most=-1.0)
    with running(stubbed(settings, tiny32, learned)) as yard:
        staged = yard.ended(yard.submit(spec(activate=missed), by="key1"))
        assert (staged.status.state, staged.status.version, staged.status.live) == (JobState.SUCCEEDED, 1, False)
        assert yard.registry.task("mood").live is None
        live = yard.ended(yard.submit(spec(activate=kept), by="key2"))
        assert (live.status.state, live.status.version, live.status.live) == (JobState.SUCCEEDED, 1, True)
    assert live.status.metrics is not None
    assert live.status.metrics["validation_exact_match"] == 1.0
    task = yard.registry.task("mood")
    assert task.traffic == ((1, 100),), "the very same content is no second version"
    assert [(version.source, version.by) for version in task.versions.values()] == [("api", "key1")]
    assert not yard.files(live).data.exists()


def test_a_process_that_is_killed_goes_on_and_comes_to_the_same_result(yard: Yard, settings: Settings) -> None:
    with running(yard):
        job = yard.submit(spec(config=LONG))
        pid = process_of(yard, job)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: yard.job_queue.job(job.id).status.restarts == 1)
        ended = yard.ended(job)
        whole = yard.ended(yard.submit(spec(config=LONG)))  # by a process of its own: sums depend on threads
    assert ended.status.state == JobState.SUCCEEDED, ended.status
    steps = yard.steps(job)
    assert steps == sorted(set(steps)), "no step is in the record twice"
    assert steps[-1] == LONG["steps"]
    lines = read_lines(yard.files(job).record)[0]
    assert [line["phase"] for line in lines if line["event"] == "phase"].count("loading") == 2

    model = FrozenModel.load(settings)
    [resumed] = load_soft_prompts(yard.files(job).result, model.spec, 512)
    [uninterrupted] = load_soft_prompts(yard.files(whole).result, model.spec, 512)
    assert torch.equal(resumed.tensor, uninterrupted.tensor)
    assert resumed.digest == uninterrupted.digest


def test_a_run_as_jobs_make_it_writes_to_no_weight(settings: Settings, tmp_path: Path) -> None:
    model = FrozenModel.load(settings)
    weights = weights_hash(model.module)
    files = TaskFiles("mood", write_rows(tmp_path / "data", ROWS), write_rows(tmp_path / "held", MOODS))
    train_task(model, files, replace(spec().config, steps=10, evaluations=2))
    assert weights_hash(model.module) == weights


def test_one_job_runs_at_a_time_in_the_order_of_their_making(yard: Yard) -> None:
    with running(yard):
        jobs = [yard.submit(spec(config=SLOW)) for _ in range(3)]
        wait_until(lambda: yard.state(jobs[0]) == JobState.RUNNING)
        assert [job.queue_position for job in yard.job_queue.jobs()] == [2, 1, None]
        yard.job_queue.cancel(jobs[1].id)
        wait_until(lambda: yard.state(jobs[1]) == JobState.CANCELLED)
        with pytest.raises(JobRuns):
            yard.job_queue.delete(jobs[0].id)
        yard.job_queue.cancel(jobs[0].id)
        wait_until(lambda: yard.state(jobs[2]) == JobState.RUNNING)
        assert yard.state(jobs[0]) == JobState.CANCELLED
        yard.job_queue.delete(jobs[0].id)
        with pytest.raises(UnknownJob):
            yard.job_queue.job(jobs[0].id)
    assert yard.state(jobs[2]) == JobState.QUEUED, "a server that stops leaves it for the next one"
    assert yard.registry.num_tasks == 0


LINE = {"event": "step", "step": 1, "loss": 1, "tokens_per_second": 1, "seconds_left": 1, "validation": None}
STEP = f"(folder / 'record.jsonl').open('a').write({json.dumps(LINE)!r} + chr(10))\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_process_that_is_killed_again_and_again_without_coming_further_is_given_up(
    settings: Settings, tiny32: FrozenModel
) -> None:
    with running(stubbed(settings, tiny32, DIE)) as yard:
        job = yard.ended(yard.submit(spec()))
    assert (job.status.state, job.status.restarts) == (JobState.FAILED, 3)
    assert job.status.error is not None
    assert "killed 4 times by signal 9" in job.status.error.error


def test_a_process_that_comes_further_each_time_is_started_again_as_often_as_it_takes(
    settings: Settings, tiny32: FrozenModel
) -> None:
    full = "(folder / 'record.jsonl').exists() and len((folder / 'record.jsonl').read_text().splitlines()) == 6"
    grow = f"if {full}: sys.exit(1)\n{STEP}{DIE}"
    with running(stubbed(settings, tiny32, grow)) as yard:
        job = yard.ended(yard.submit(spec()))
    assert (job.status.state, job.status.restarts) == (JobState.FAILED, 6)


def test_a_process_that_fails_is_not_started_again(settings: Settings, tiny32: FrozenModel) -> None:
    with running(stubbed(settings, tiny32, "sys.exit(1)")) as yard:
        job = yard.ended(yard.submit(spec()))
    assert job.status.state == JobState.FAILED
    assert job.status.error is not None
    assert (job.status.error.code, job.status.restarts) == ("internal_error", 0)


def test_what_only_the_model_shows_fails_the_job_in_the_words_of_whoever_sent_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.process_main.end_with", lambda parent: None)

    def start(folder: JobFolder, settings: Settings) -> subprocess.Popen[bytes]:
        write_order(folder, settings, os.getpid(), steps_back=False)
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({main(folder.path)})"])

    monkeypatch.setattr(yard.runner, "_start_child", start)
    with running(yard):
        wordy = spec(config=LEARNS | {"teacher_template": "Well, " * 12 + "{input}", "labels": ("yes", "no")})
        job = yard.ended(yard.submit(wordy, [*ROWS, ("far " * 15, "no")]))
    assert job.status.error is not None
    assert job.status.error.code == "invalid_training_data"
    assert job.status.error.error.startswith("rows.jsonl, line 21: the teacher reads ")


def test_a_server_that_was_killed_finds_its_jobs_and_the_process_that_it_left_is_ended(
    settings: Settings, tiny32: FrozenModel, learned: str
) -> None:
    sleeping = stubbed(settings, tiny32, "time.sleep(600)")
    job = sleeping.submit(spec())
    sleeping.runner._adopt()
    sleeping.runner._turn()
    assert sleeping.runner._lock is not None
    sleeping.runner._lock.close()  # as the system does for a process that is killed
    status = sleeping.job_queue.job(job.id).status
    assert status.state == JobState.RUNNING
    assert status.pid is not None
    assert psutil.pid_exists(status.pid)
    with running(stubbed(settings, tiny32, learned)) as yard:
        ended = yard.ended(job)
    assert (ended.status.state, ended.status.restarts) == (JobState.SUCCEEDED, 1), ended.status
    assert not psutil.pid_exists(status.pid)
    assert sleeping.runner._running is not None
    sleeping.runner._running[1].wait()


def test_of_two_servers_on_a_folder_one_runs_jobs_until_it_stops(settings: Settings, tiny32: FrozenModel) -> None:
    one, two = (stubbed(settings, tiny32, "time.sleep(600)") for _ in range(2))
    job = one.submit(spec())
    with running(two):
        with running(one):
            wait_until(lambda: one.state(job) == JobState.RUNNING)
        wait_until(lambda: two.runner._running is not None)
        assert one.runner._running is None or one.runner._running[1].poll() is not None
        one.job_queue.cancel(job.id)
        wait_until(lambda: two.state(job) == JobState.CANCELLED)


def test_a_result_is_published_once_although_the_server_was_killed_in_between(
    settings: Settings, tiny32: FrozenModel, learned: str
) -> None:
    with running(stubbed(settings, tiny32, learned)) as yard:
        job = yard.ended(yard.submit(spec(activate=True)))
    files = yard.files(job)
    files.write_status(replace(job.status, state=JobState.RUNNING, ended_at=None, version=None))
    again = stubbed(settings, tiny32, "sys.exit(1)", yard.registry)
    with running(again):
        ended = again.ended(job)
    assert (ended.status.state, ended.status.version, ended.status.live) == (JobState.SUCCEEDED, 1, True)
    assert list(yard.registry.task("mood").versions) == [1]

    files.write_status(replace(job.status, state=JobState.RUNNING, ended_at=None, version=None))
    objects = MemoryObjects()
    failures = iter([True, True])
    objects.fails = lambda action, key: action == "create" and next(failures, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.jobs.supervisor.PUBLISH_WAITS", (0.01, 0.01, 0.01))
        other = stubbed(settings, tiny32, "sys.exit(1)", Registry(Store(objects), tiny32.spec, 512))
        with running(other):
            assert other.ended(job).status.state == JobState.SUCCEEDED, "a store that is away for a moment"
    with pytest.raises(StopIteration):
        next(failures)


def test_only_the_newest_jobs_that_are_over_are_kept(
    settings: Settings, tiny32: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.supervisor.KEPT", 2)
    with running(stubbed(settings, tiny32, "sys.exit(1)")) as yard:
        jobs = [yard.submit(spec()) for _ in range(4)]
        wait_until(lambda: yard.job_queue.files.ids() == [job.id for job in jobs[2:]], 20)
        wait_until(lambda: yard.state(jobs[3]).is_over)
