"""Progress bars of training, on this machine or on a server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command itself loads torch, so that --help is fast
    from tqdm import tqdm

    from server.client import Job
    from server.train.learning_rate import Tried
    from server.train.run_history import TrainingProgress


def in_words(exact_match: float | None, loss: float | None) -> str:
    """Format a measurement; a server leaves out figures that are not finite."""
    match = "unknown" if exact_match is None else f"{exact_match:.1%}"
    return f"validation exact match {match}, loss {'not finite' if loss is None else f'{loss:.4f}'}"


class Bars:
    """Progress bars for the teacher's rows, the search for a learning rate, and the training steps."""

    def __init__(self, task: str, steps: int, taught: int) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm
        self._task, self._steps, self._taught = task, steps, taught
        self._bar: tqdm[Any] | None = None
        self._shown = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_taught(self) -> None:
        """Count a row that the teacher has answered."""
        self._on("teacher", "row", self._taught).update()

    def on_sweep_step(self, progress: TrainingProgress) -> None:
        """Count a step of the search."""
        self._on("learning rate", "step", None).update()

    def on_tried(self, tried: Tried) -> None:
        """Show the result of a learning rate."""
        self._on("learning rate", "step", None).write(
            f"learning rate {tried.learning_rate:g}: validation loss {tried.loss:.4f}"
        )

    def on_step(self, progress: TrainingProgress) -> None:
        """Show a training step; measurements are written above the bar."""
        is_first = self._shown != self._task
        bar = self._on(self._task, "step", self._steps)
        if is_first and progress.step > 1:
            bar.write(f"resumes after step {progress.step - 1}")
        bar.set_postfix(loss=f"{progress.loss:.3f}", speed=f"{progress.tokens_per_second:.0f} tokens/s", refresh=False)
        bar.update(progress.step - bar.n)  # a resumed run does not begin at 0
        if score := progress.validation:
            bar.write(f"step {progress.step}: {in_words(score.exact_match, score.loss)}")

    def _on(self, description: str, unit: str, total: int | None) -> tqdm[Any]:
        if self._bar is not None and self._shown == description:
            return self._bar
        self.__exit__()
        self._bar, self._shown = self._tqdm(desc=description, unit=unit, total=total, dynamic_ncols=True), description
        return self._bar


class JobBar:
    """The progress bar of a job on a server."""

    def __init__(self, job: Job) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=job["steps"], initial=job["step"], unit="step", dynamic_ncols=True)
        self._measured = 0

    def __enter__(self) -> JobBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def write(self, line: str) -> None:
        """Write a line above the bar, to stderr like the bar; stdout is for the job's result."""
        self._bar.write(line, file=sys.stderr)

    def show(self, job: Job) -> None:
        """Show a job's progress."""
        self._bar.set_description(f"{job['task']}: {standing(job)}", refresh=False)
        if job.get("loss") is not None:
            speed = job.get("tokens_per_second") or 0
            self._bar.set_postfix(loss=f"{job['loss']:.3f}", speed=f"{speed:.0f} tokens/s", refresh=False)
        if job["step"] != self._bar.n:
            self._bar.update(job["step"] - self._bar.n)
        if sys.stderr.isatty():
            self._bar.refresh()
        score = job.get("validation")
        if score is not None and score["step"] > self._measured:
            self._measured = score["step"]
            self.write(f"step {score['step']}: {in_words(score['exact_match'], score['loss'])}")


def standing(job: Job) -> str:
    """The state of a job, in a few words."""
    if job["cancelling"]:
        return "is being cancelled"
    if job["state"] == "queued":
        return f"waits, number {job.get('queue_position', 1)} in the queue"
    if job["state"] == "running":
        return job.get("phase", "starts").replace("_", " ")
    return job["state"]
