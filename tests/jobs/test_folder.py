from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.engine.model.preflight import Stored
from server.errors import InsufficientMemory, StoreError, UnknownJob
from server.jobs.check_memory import check_room, weight_bytes
from server.jobs.folder import JobsFolder
from server.jobs.job import JOB_ID, ActivateIf, DataNames, JobSpec, JobState, new_job_id
from server.jobs.process_main import end_with
from server.jobs.progress_log import Recorder, read_lines, read_progress
from server.settings import Settings
from server.train.config import TrainingConfig

NAMES = DataNames("rows.jsonl")


def test_ids_sort_by_time_and_are_no_paths() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_job_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert all(JOB_ID.fullmatch(job_id) for job_id in ids)


@pytest.mark.parametrize("job_id", ["..", "../x", "", "20261125t101500123-9f3a1c2b7d10", ".lock", "a/b"])
def test_an_id_that_is_none_leads_nowhere(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(UnknownJob):
        JobsFolder(tmp_path).folder(job_id)


def test_a_job_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = JobsFolder(tmp_path / "jobs")
    with folder.draft() as draft:
        draft.data.write_text("rows")
        assert folder.ids() == []
    assert list((tmp_path / "jobs").iterdir()) == []
    with folder.draft() as draft:
        draft.data.write_text("rows")
        job = folder.add(draft, JobSpec(task="mood"), NAMES, "key")
    assert folder.jobs() == [job]
    assert (job.spec.task, job.by, job.status.state) == ("mood", "key", JobState.QUEUED)
    assert folder.folder(job.id).data.read_text() == "rows"


def test_a_folder_that_cannot_be_written_is_the_operators_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be kept") as caught, JobsFolder(tmp_path / "file").draft():
        pass
    assert "PRELUDE_JOBS_DIR" in caught.value.remedy


def test_a_broken_job_hides_no_other(tmp_path: Path) -> None:
    folder = JobsFolder(tmp_path)
    jobs = []
    for _ in range(2):
        with folder.draft() as draft:
            jobs.append(folder.add(draft, JobSpec(task="mood"), NAMES, None))
    (tmp_path / jobs[0].id / "status.json").write_text("{")
    assert folder.jobs() == [jobs[1]]


def test_drafts_of_long_ago_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".new-a", tmp_path / ".new-b"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    JobsFolder(tmp_path).tidy(10)
    assert [path.name for path in tmp_path.iterdir()] == [".new-b"]


def recorder(path: Path, steps: int = 10) -> Recorder:
    return Recorder(path, TrainingConfig(steps=steps))


def test_a_record_holds_no_step_twice_and_goes_on_behind_a_line_that_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    first = recorder(path)
    first.tried(0.1, float("inf"))
    for step in range(1, 5):
        first.step(step, 1.0 / step, 100.0, {"loss": 2.0, "exact_match": 0.5} if step == 2 else None)
    first.close()
    with path.open("a") as file:
        file.write('{"event": "st')
    assert read_progress(path).step == 4
    again = recorder(path)
    again.phase("training", "now")
    assert read_progress(path).seconds_left is None
    again.tried(0.1, float("inf"))
    for step in range(3, 11):
        again.step(step, 1.0 / step, 100.0, None)
    again.close()
    lines = read_lines(path)[0]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 11))
    assert [line["loss"] for line in lines if line["event"] == "tried"] == [None]
    progress = read_progress(path)
    assert (progress.step, progress.phase, progress.loss, progress.seconds_left) == (10, "training", 0.1, 0.0)
    assert progress.validation == {"step": 2, "loss": 2.0, "exact_match": 0.5}


def test_of_a_long_run_about_a_thousand_steps_are_recorded_and_every_measurement(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    long = recorder(path, 100_000)
    for step in range(1, 100_001):
        long.step(step, 1.0, 1.0, {"loss": 1.0, "exact_match": 0.0} if step == 777 else None)
    long.close()
    steps = [line["step"] for line in read_lines(path)[0]]
    assert 1000 <= len(steps) <= 1010
    assert {1, 777, 100_000} <= set(steps)
    assert read_progress(path).step == 100_000


def test_a_reader_goes_on_where_it_stopped_and_never_sees_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert read_lines(path) == ([], 0)
    path.write_text('{"event": "a"}\n{"event"')
    lines, offset = read_lines(path)
    assert [line["event"] for line in lines] == ["a"]
    with path.open("a") as file:
        file.write(': "b"}\n')
    assert [line["event"] for line in read_lines(path, offset)[0]] == ["b"]


@pytest.mark.parametrize(
    ("bound", "value", "holds"),
    [
        ({"at_least": 0.9}, 0.9, True),
        ({"at_least": 0.9}, 0.89, False),
        ({"at_most": 0.1}, 0.1, True),
        ({"at_least": 0.1, "at_most": 0.2}, 0.3, False),
        ({"at_least": 0.0}, None, False),
    ],
)
def test_a_bound_holds_for_what_keeps_to_it(bound: dict[str, float], value: float | None, holds: bool) -> None:
    rule = ActivateIf(metric="validation_loss", **bound)
    assert rule.holds(value) == holds
    assert JobSpec(task="t", activate=rule).activates({"validation_loss": value}) == holds
    assert not JobSpec(task="t", activate=rule).activates(None)


def test_a_second_copy_of_the_weights_must_fit_the_device(model_directory: Path, tiny32: FrozenModel) -> None:
    settings = Settings.load(model=str(model_directory), dtype="bfloat16", device="cpu")
    numbers = sum(parameter.numel() for parameter in tiny32.module.parameters())
    assert weight_bytes(settings, torch.device("cpu")) == 2 * numbers
    check_room(10, 10, "cuda:0")
    with pytest.raises(InsufficientMemory, match="a second copy of the frozen model on cuda:0") as caught:
        check_room(3 * 2**20, 2**20, "cuda:0")
    assert "3 MiB" in caught.value.message
    assert "1 MiB are free" in caught.value.message


def test_a_quantised_checkpoint_needs_what_it_stores(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(model_directory, tmp_path / "quantised")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    stored = {"a.qweight": Stored("I32", 1000), "a.scales": Stored("F16", 10)}
    monkeypatch.setattr("server.jobs.check_memory.check_files", lambda directory: stored)
    settings = Settings.load(model=str(directory), dtype="bfloat16", device="cpu")
    assert weight_bytes(settings, torch.device("cuda:0")) == 4000 + 20


def test_a_process_ends_once_its_parent_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("server.jobs.process_main.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("server.jobs.process_main.os._exit", lambda code: ended.set())
    parent = os.getppid()
    end_with(parent)
    assert not ended.wait(0.1)
    monkeypatch.setattr("server.jobs.process_main.os.getppid", lambda: 1)
    assert ended.wait(2)


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = JobSpec(
        task="mood",
        config=TrainingConfig(learning_rate=0.1, labels=("a", "b"), teacher_template="x {input}"),
        activate=ActivateIf(metric="validation_loss", at_most=0.5),
        description="ü",
    )
    folder = JobsFolder(tmp_path)
    with folder.draft() as draft:
        job = folder.add(draft, spec, NAMES, None)
    assert folder.job(job.id).spec == spec
    assert json.loads((tmp_path / job.id / "spec.json").read_bytes())["names"]["data"] == "rows.jsonl"
