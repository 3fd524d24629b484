"""A queue and a runner around real processes, which train a tiny model from a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.engine.attention.interface import ATTENTION_NAME
from server.engine.model.frozen import FrozenModel
from server.jobs.folder import JobFolder
from server.jobs.job import DataNames, Job, JobSpec, JobState
from server.jobs.job_queue import JobQueue
from server.jobs.progress_log import read_lines
from server.jobs.supervisor import JobRunner, Start
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.train.config import TrainingConfig
from tests.api.live import start_eagerly, wait_until
from tests.registry.fakes import MemoryObjects
from tests.support import byte_tokenizer, tiny_module
from tests.train.rows import MOODS, write_rows

ROWS = MOODS * 5
"""Enough of them for their targets to be labels."""
SECONDS = 120.0
"""A process imports torch and transformers before it does anything, on a machine that may be busy."""
LEARNS: dict[str, Any] = {"num_virtual_tokens": 20, "steps": 160, "batch_size": 4, "learning_rate": 0.3}
SLOW = LEARNS | {"steps": 1_000_000, "evaluations": 100_000, "learning_rate": 1e-4}
"""It would take an hour, and leaves a checkpoint every ten steps."""


def save_tiny_model(directory: Path) -> Path:
    """A checkpoint that transformers loads."""
    tiny_module(dtype=torch.float32, attention=ATTENTION_NAME).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def spec(task: str = "mood", config: dict[str, Any] | None = None, **fields: Any) -> JobSpec:
    """A job that learns MOODS."""
    return JobSpec(task=task, config=TrainingConfig(**(LEARNS if config is None else config)), **fields)


@dataclass
class Yard:
    """A folder of jobs, a registry that takes their results, and the runner between them."""

    settings: Settings
    registry: Registry
    job_queue: JobQueue
    runner: JobRunner

    def submit(self, asked: JobSpec, rows: Sequence[tuple[str, str]] = ROWS, by: str | None = None) -> Job:
        """Queue a job whose validation rows are its training rows."""
        self.job_queue.check(asked)
        with self.job_queue.files.draft() as draft:
            write_rows(draft.data, rows)
            write_rows(draft.validation, MOODS)
            return self.job_queue.submit(draft, asked, DataNames("rows.jsonl", "held.jsonl"), by)

    def state(self, job: Job) -> JobState:
        """Where it stands now."""
        return self.job_queue.job(job.id).status.state

    def ended(self, job: Job) -> Job:
        """Wait for a job's end."""
        wait_until(lambda: self.state(job).is_over, SECONDS)
        return self.job_queue.job(job.id)

    def steps(self, job: Job) -> list[int]:
        """Those in its record."""
        lines = read_lines(self.job_queue.files.folder(job.id).record)[0]
        return [line["step"] for line in lines if line["event"] == "step"]

    def files(self, job: Job) -> JobFolder:
        """Its folder."""
        return self.job_queue.files.folder(job.id)


def make_yard(
    settings: Settings, model: FrozenModel, registry: Registry | None = None, start: Start = start_eagerly
) -> Yard:
    """Nothing runs yet."""
    registry = registry or Registry(Store(MemoryObjects()), model.spec, 512)
    job_queue = JobQueue(settings, registry.model, model.text.encode)
    return Yard(settings, registry, job_queue, JobRunner(settings, registry, job_queue, start))


@contextmanager
def running(yard: Yard) -> Iterator[Yard]:
    """Its runner runs until the block ends."""
    yard.runner.start()
    try:
        yield yard
    finally:
        yard.runner.stop()


SLEEP = "time.sleep(600)"


def stubbed(settings: Settings, model: FrozenModel, code: str = SLEEP, registry: Registry | None = None) -> Yard:
    """A yard whose processes do this instead of training; `folder` is the job's."""

    def start(folder: JobFolder, settings: Settings) -> subprocess.Popen[bytes]:
        head = f"import pathlib, shutil, sys, time; folder = pathlib.Path({str(folder.path)!r})\n"
        return subprocess.Popen([sys.executable, "-S", "-c", head + code])

    return make_yard(settings, model, registry, start)


@contextmanager
def by_hand(yard: Yard) -> Iterator[Yard]:
    """Let the runner take its turns by hand until the block ends."""
    assert yard.runner._adopt()
    yield yard
    yard.runner._interrupt()
    assert yard.runner._lock is not None
    yard.runner._lock.close()


def finished(yard: Yard) -> None:
    """Wait until that process has ended by itself."""
    assert yard.runner._running is not None
    assert yard.runner._running[1].wait(30) == 0
