"""A job's process: `python -m server.jobs.process_main FOLDER` trains what FOLDER says and writes the result there.

The process runs at idle priority, is the first that Linux kills if memory runs out, and ends when its parent ends.
Exit status: 0 the result is there; 2 the job cannot be done, failure.json says why; 3 the disk is full, so nothing can
say why; any other status is a crash.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from server.durable import NO_SPACE
from server.errors import PreludeError
from server.jobs.folder import JobFolder, write_json
from server.jobs.job import Job, now
from server.jobs.progress_log import Recorder
from server.log_lines import LineFormatter
from server.openmp import bound_primitives, expand_segments, share_cores
from server.settings import Settings

if TYPE_CHECKING:  # torch must not be there before priorities and OpenMP's variables are set
    from server.engine.model.frozen import FrozenModel
    from server.train.learning_rate import Tried
    from server.train.output import Trained
    from server.train.run_history import TrainingProgress

log = logging.getLogger(__name__)

DONE, REFUSED, FULL = 0, 2, 3
LOOK_SECONDS = 0.5
"""How often to see whether the parent is still there."""


def main(path: Path) -> int:
    """Train a folder's job; returns the exit status."""
    folder = JobFolder(path)
    order = json.loads(folder.order.read_bytes())
    if order["steps_back"]:
        step_back()
    end_with(order["parent"])
    share_cores()
    bound_primitives()
    expand_segments()
    settings = Settings.load(**order["settings"])
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    job = folder.read()
    try:
        return _try(folder, job, settings)
    except Exception as exc:
        if not _is_full(exc):
            raise
        log.exception("no space is left on the disk")
        return FULL


def _try(folder: JobFolder, job: Job, settings: Settings) -> int:
    try:
        with contextlib.closing(Recorder(folder.record, job.spec.config)) as recorder:
            run(folder, job, recorder, settings)
    except PreludeError as exc:
        from server.jobs.check import as_failure

        log.error("%s", exc)
        write_json(folder.failure, asdict(as_failure(exc, folder, job.names)))
        return REFUSED
    return DONE


def _is_full(exc: Exception) -> bool:
    """Whether an error means that the disk is full. safetensors reports this only in its message."""
    numbers = (exc.errno,) if isinstance(exc, OSError) else (n for n in NO_SPACE if f"(os error {n})" in str(exc))
    return any(number in NO_SPACE for number in numbers)


def run(folder: JobFolder, job: Job, recorder: Recorder, settings: Settings) -> None:
    """Load the model, train, write the result; raises PreludeError if the job cannot be done."""
    from server.engine.model.frozen import FrozenModel
    from server.jobs.check_memory import check_fits
    from server.train.dtype import training_settings
    from server.train.output import write_task

    recorder.phase("loading", now())
    check_fits(settings)
    model = FrozenModel.load(training_settings(settings))
    recorder.phase("reading", now())
    trained = train(folder, job, recorder, settings, model)
    recorder.phase("writing", now())
    write_task(folder.result, trained, model.spec)
    log.info("done: %s", trained.manifest.metrics)


def train(folder: JobFolder, job: Job, recorder: Recorder, settings: Settings, model: FrozenModel) -> Trained:
    """Run the trainer and record its progress."""
    from server.interpret.nearest_task import with_start
    from server.train.config import NEAREST_TASK
    from server.train.inputs import TaskFiles, read_task
    from server.train.train_task import train_task

    watch = _Watch(recorder)
    files = TaskFiles(
        task=job.spec.task,
        training=folder.data,
        validation=folder.validation if folder.validation.exists() else None,
        input_template=job.spec.input_template,
        system_message=job.spec.system_message,
        description=job.spec.description,
        licence=job.spec.licence,
        max_virtual_tokens=settings.max_virtual_tokens,
        max_new_tokens=job.spec.max_new_tokens,
        start=folder.start if folder.start.exists() else None,
    )
    config = job.spec.config
    if config.init == NEAREST_TASK:
        rows = read_task(files, config)
        candidates = {path.name: path for path in sorted(folder.candidates.glob("*"))}
        files, config = with_start(model, files, config, rows, candidates, log.info)
    return train_task(
        model,
        files,
        config,
        watch.on_step,
        checkpoint=folder.checkpoint,
        on_tried=watch.on_tried,
        on_sweep_step=watch.on_sweep_step,
        on_taught=watch.on_taught,
    )


class _Watch:
    """Writes the trainer's callbacks to the record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._phase = ""

    def on_taught(self) -> None:
        self._enter("teacher")

    def on_sweep_step(self, progress: TrainingProgress) -> None:
        self._enter("learning_rate")

    def on_tried(self, tried: Tried) -> None:
        log.info("learning rate %g: validation loss %.4f", tried.learning_rate, tried.loss)
        self._recorder.tried(tried.learning_rate, tried.loss)

    def on_step(self, progress: TrainingProgress) -> None:
        self._enter("training")
        score = progress.validation
        if score is not None:
            log.info("step %d: validation exact match %.4f, loss %.4f", progress.step, score.exact_match, score.loss)
        self._recorder.step(
            progress.step,
            progress.loss,
            progress.tokens_per_second,
            None if score is None else {"loss": score.loss, "exact_match": score.exact_match},
        )

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._recorder.phase(phase, now())


def step_back() -> None:
    """Let the server have the cores whenever it wants them, and the memory; threads that come later inherit it."""
    with contextlib.suppress(AttributeError, OSError):  # not on every system
        os.nice(19)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # else Linux kills the process with the most memory, which may be the server
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def end_with(parent: int) -> None:
    """End this process once its parent is gone: nobody would take the result, and the next server resumes the job."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
