"""What goes wrong with one job stops no other, and what was withdrawn in time is never published."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.contracts import TemplatedText
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest, InvalidTrainingData, RequestAborted, StoreFull
from server.jobs import publish
from server.jobs.folder import JobFolder
from server.jobs.job import DataNames, Job, JobState, Status
from server.jobs.job_queue import JobQueue
from server.jobs.launcher import Child
from server.jobs.process_main import FULL, _is_full
from server.jobs.supervisor import JobRunner
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts
from tests.api.live import wait_until
from tests.api.telemetry.logged import logged
from tests.jobs.support import LEARNS, ROWS, SLEEP, by_hand, finished, running, spec, stubbed
from tests.registry.fakes import MemoryObjects
from tests.train.rows import write_rows


def _status_is_a_folder(path: Path) -> None:
    (path / "status.json").unlink()
    (path / "status.json").mkdir()


def _folder_is_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "the folder is removed": shutil.rmtree,
    "the status is broken": lambda path: (path / "status.json").write_text("{"),
    "the status is a folder": _status_is_a_folder,
    "the specification is gone": lambda path: (path / "spec.json").rename(path / "spec"),
    "the folder is a file": _folder_is_a_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_job_whose_folder_breaks_is_over_with_a_sentence_and_the_next_one_runs(
    settings: Settings, tiny32: FrozenModel, damage: str
) -> None:
    with running(stubbed(settings, tiny32)) as yard, logged() as log:
        job, later = yard.submit(spec()), yard.submit(spec())
        wait_until(lambda: yard.job_queue.job(job.id).status.pid is not None)  # written last
        assert yard.runner._running is not None
        child = yard.runner._running[1]
        DAMAGES[damage](yard.files(job).path)
        wait_until(lambda: yard.state(later) == JobState.RUNNING, 10)
        assert child.poll() is not None, "its process is not left behind"
    assert f"training job {job.id} failed: Its folder is gone or cannot be read" in log.text
    assert "Traceback" not in log.text


def test_a_folder_of_jobs_that_vanishes_whole_is_begun_anew(settings: Settings, tiny32: FrozenModel) -> None:
    with running(stubbed(settings, tiny32)) as yard:
        job = yard.submit(spec())
        wait_until(lambda: yard.job_queue.job(job.id).status.pid is not None)
        settings.jobs_folder.rename(settings.jobs_folder.with_name("gone"))
        wait_until(lambda: yard.runner._running is None, 10)
        wait_until(lambda: yard.runner._lock is None, 10)
        again = yard.submit(spec())
        wait_until(lambda: yard.state(again) == JobState.RUNNING, 10)


def test_a_job_whose_process_cannot_be_started_fails_and_the_next_one_runs(
    settings: Settings, tiny32: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard = stubbed(settings, tiny32)
    start, errors = yard.runner._start_child, iter([OSError("no memory"), ValueError("no such option")])

    def fails(folder: JobFolder, settings: Settings) -> Child:
        for error in errors:
            raise error
        return start(folder, settings)

    monkeypatch.setattr(yard.runner, "_start_child", fails)
    with running(yard):
        jobs = [yard.submit(spec()) for _ in range(3)]
        wait_until(lambda: yard.state(jobs[2]) == JobState.RUNNING, 10)
    for job in jobs[:2]:
        error = yard.job_queue.job(job.id).status.error
        assert error is not None
        assert "cannot be started" in error.error


def test_a_full_disk_ends_the_job_in_words_and_stops_no_other(
    settings: Settings, tiny32: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(stubbed(settings, tiny32, f"sys.exit({FULL})")) as yard:
        error = yard.ended(yard.submit(spec())).status.error
    assert error is not None
    assert (error.code, error.error) == (StoreFull.code, "No space is left where PRELUDE_JOBS_DIR is.")

    write, full = JobFolder.write_status, {"": True}

    def write_if_there_is_room(folder: JobFolder, status: Status) -> None:
        if status.state.is_over and full[""]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, status)

    monkeypatch.setattr(JobFolder, "write_status", write_if_there_is_room)
    with running(stubbed(settings, tiny32, "sys.exit(1)")) as yard:
        one, two = yard.submit(spec()), yard.submit(spec())
        wait_until(lambda: {one.id, two.id} <= yard.runner._unwritten.keys(), 20)
        full[""] = False
        assert {yard.ended(job).status.state for job in (one, two)} == {JobState.FAILED}


def test_a_full_disk_is_known_by_number_or_text() -> None:
    assert _is_full(OSError(errno.ENOSPC, "x"))
    assert _is_full(RuntimeError(f"I/O error: No space left on device (os error {errno.ENOSPC})"))
    assert not _is_full(OSError(errno.EACCES, "x"))
    assert not _is_full(RuntimeError("x"))


def test_a_cancelled_job_never_publishes_though_its_process_has_succeeded(
    settings: Settings, tiny32: FrozenModel, result: str
) -> None:
    yard = stubbed(settings, tiny32, result)
    job = yard.submit(spec(activate=True))
    with by_hand(yard):
        yard.runner._turn()
        finished(yard)
        yard.job_queue.cancel(job.id)
        assert yard.job_queue.job(job.id).is_cancelling
        yard.runner._turn()
    assert yard.state(job) == JobState.CANCELLED
    assert yard.registry.num_tasks == 0


def test_a_cancellation_right_before_the_publish_wins_and_one_after_it_is_not_acknowledged(
    settings: Settings, tiny32: FrozenModel, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_soft_prompts
    yard = stubbed(settings, tiny32, result)
    jobs = [yard.submit(spec(task=task)) for task in ("early", "late")]

    def cancel_and_load(*given: object) -> object:
        yard.job_queue.cancel(jobs[0].id)
        return load(*given)  # type: ignore[arg-type]

    put = yard.registry.publish
    seen: list[Job] = []

    def cancel_and_publish(*given: object, **options: object) -> object:
        yard.job_queue.cancel(jobs[1].id)
        seen.append(yard.job_queue.job(jobs[1].id))
        return put(*given, **options)  # type: ignore[arg-type]

    with by_hand(yard):
        yard.runner._turn()
        finished(yard)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "load_soft_prompts", cancel_and_load)
            yard.runner._turn()  # which begins the next one as well
        assert yard.state(jobs[0]) == JobState.CANCELLED
        assert yard.registry.num_tasks == 0
        monkeypatch.setattr(yard.registry, "publish", cancel_and_publish)
        finished(yard)
        yard.runner._turn()
    assert not seen[0].is_cancelling, "it is too late, and whoever cancels is not told otherwise"
    assert yard.state(jobs[1]) == JobState.SUCCEEDED


@pytest.mark.parametrize("phase", ["waiting", "running", "publishing"])
@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "not cancelled"])
def test_a_job_ends_once_in_whatever_phase_its_server_is_shut_down(
    settings: Settings,
    tiny32: FrozenModel,
    result: str,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    is_cancelled: bool,
) -> None:
    ends: list[tuple[str, JobState]] = []
    end = JobRunner._end

    def counted(runner: JobRunner, job: Job, state: JobState, **more: object) -> None:
        ends.append((job.spec.task, state))
        end(runner, job, state, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(JobRunner, "_end", counted)
    objects = MemoryObjects()
    registry = Registry(Store(objects), tiny32.spec, 512)
    first = stubbed(settings, tiny32, result if phase == "publishing" else SLEEP, registry)
    if phase == "waiting":
        first.submit(spec("before"))
    job = first.submit(spec("mood", activate=True))
    with by_hand(first):
        first.runner._turn()
        if phase == "publishing":
            finished(first)
            objects.fails = lambda action, key: action == "create"
            first.runner._stop.set()
            first.runner._turn()
            assert first.job_queue.files.folder(job.id).publishing.exists()
            objects.fails = lambda action, key: False
        assert first.state(job) == (JobState.QUEUED if phase == "waiting" else JobState.RUNNING)
        if is_cancelled:
            first.job_queue.cancel(job.id)
    assert not [task for task, _ in ends if task == "mood"], "the next server ends it"

    second = stubbed(settings, tiny32, result, registry)
    with by_hand(second):
        for _ in range(4):
            second.runner._turn()
            if second.runner._running is not None:
                finished(second)
    wanted = JobState.CANCELLED if is_cancelled else JobState.SUCCEEDED
    assert [state for task, state in ends if task == "mood"] == [second.state(job)] == [wanted]
    assert [task.name for task in registry.tasks() if task.name == "mood"] == ([] if is_cancelled else ["mood"])
    if not is_cancelled:
        assert list(registry.task("mood").versions) == [1]
        assert second.job_queue.job(job.id).status.restarts == (phase != "waiting")


def test_states_are_read_again_only_once_they_have_changed(settings: Settings, tiny32: FrozenModel) -> None:
    yard = stubbed(settings, tiny32)
    jobs = [yard.submit(spec()) for _ in range(2)]
    assert yard.job_queue.files.states() == {job.id: JobState.QUEUED for job in jobs}
    for number in range(998):
        shutil.copytree(yard.files(jobs[0]).path, settings.jobs_folder / f"{jobs[0].id[:-12]}{number:012x}")
    assert len(yard.job_queue.files.states()) == 1000
    started = time.thread_time()  # of this thread alone, whatever else the machine does
    assert len(yard.job_queue.files.states()) == 1000
    assert time.thread_time() - started < 0.1
    yard.files(jobs[1]).write_status(Status(JobState.FAILED))
    assert yard.job_queue.files.states()[jobs[1].id] == JobState.FAILED
    (yard.files(jobs[0]).path / "status.json").write_text("{}")
    assert jobs[0].id not in yard.job_queue.files.states()


def test_texts_that_can_never_fit_are_refused_by_their_characters_and_never_tokenised(
    settings: Settings, tiny32: FrozenModel
) -> None:
    longest = 0

    def encode(text: str | TemplatedText, *, add_special_tokens: bool = True) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text if isinstance(text, str) else text.text))
        return tiny32.text.encode(text, add_special_tokens=add_special_tokens)

    job_queue = JobQueue(settings, tiny32.spec, encode, can_fit=lambda *texts: sum(map(len, texts)) <= 1000)
    with pytest.raises(InvalidRequest, match="teacher's text does not fit"):
        job_queue.check(spec(config=LEARNS | {"teacher_template": "{input} " + "word " * 700_000}))
    looks = 0

    def check_cancelled() -> None:
        nonlocal looks
        looks += 1

    with job_queue.files.draft() as draft:
        write_rows(draft.data, [*ROWS, (" " * 60_000 + "x", "yes")])
        with pytest.raises(InvalidTrainingData, match=r"rows.jsonl, line 21: 60,004 characters can never fit"):
            job_queue.submit(draft, spec(), DataNames("rows.jsonl"), None, check_cancelled=check_cancelled)
    assert longest <= 1000
    assert looks > 20, "it asks at every row whether to go on"


def test_a_check_that_is_called_off_queues_nothing(settings: Settings, tiny32: FrozenModel) -> None:
    job_queue = JobQueue(settings, tiny32.spec, tiny32.text.encode)
    looks = 0

    def check_cancelled() -> None:
        nonlocal looks
        looks += 1
        if looks == 10:
            raise RequestAborted("The client went away.")

    with job_queue.files.draft() as draft:
        write_rows(draft.data, ROWS)
        with pytest.raises(RequestAborted):
            job_queue.submit(draft, spec(), DataNames("rows.jsonl"), None, check_cancelled=check_cancelled)
    assert job_queue.jobs() == []
    assert not list(settings.jobs_folder.glob(".new-*"))
