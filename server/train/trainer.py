"""The training loop: only what a method learns has gradients, and the best evaluated state is kept.

A run can be stopped at any step and resumes from its checkpoint with the same numbers, bit for bit: what a step reads
depends on its number alone (`batches.py`), and everything else that changes is in the checkpoint.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidTrainingData
from server.train.batches import Batches
from server.train.checkpoint import TrainingCheckpoint, load_checkpoint, save_checkpoint
from server.train.config import TrainingConfig
from server.train.forward import target_logits
from server.train.methods import LearnedPrefix, clone_state
from server.train.objectives import Lesson, Objective
from server.train.recompute import recomputes, recomputing
from server.train.run_history import Measured, TeacherForcedScore, TrainingProgress, TrainingResult, best_of

CHECKPOINT_SECONDS = 30.0
MEASURED_TOGETHER = 32


@dataclass(frozen=True)
class TrainingProblem:
    """What a run learns, and from what."""

    model: FrozenModel
    prefix: LearnedPrefix
    objective: Objective
    training: Sequence[Lesson]
    validation: Sequence[Lesson]


def train(
    work: TrainingProblem,
    config: TrainingConfig,
    learning_rate: float,
    on_step: Callable[[TrainingProgress], None] = lambda progress: None,
    *,
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Train, and return the state that scored best on the validation rows.

    Args:
        work: what is learned; its prefix is left in that state.
        on_step: called after each step; if it raises, the run ends.
        checkpoint: folder for checkpoints: the run resumes from one if it exists, and writes its own there.

    Raises:
        InvalidTrainingData: the loss became NaN or infinite; the training so far is lost.
    """
    run = _Run(work, config, learning_rate)
    if checkpoint is not None and (kept := load_checkpoint(checkpoint)) is not None:
        run.restore(kept)
    saved_at = time.monotonic()
    while not run.is_over:
        progress = run.step()
        if checkpoint is not None and (progress.validation or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
            save_checkpoint(checkpoint, run.state())
            saved_at = time.monotonic()
        on_step(progress)
    return run.result()


class _Run:
    """The state of a run between two steps."""

    def __init__(self, work: TrainingProblem, config: TrainingConfig, learning_rate: float) -> None:
        self._work, self._config = work, config
        work.prefix.to(work.model.device)
        self._parameters = list(work.prefix.parameters())
        self._optimizer = make_optimizer(config, self._parameters, learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, config)
        )
        lengths = [lesson.num_fed for lesson in work.training]
        largest = sorted(work.training, key=lambda lesson: lesson.num_fed)[-config.batch_size :]
        self._recomputes = recomputes(
            work.model, config, [example for lesson in largest for example in lesson.examples]
        )
        self._batches = Batches(lengths, config.batch_size, config.seed)
        self._measured_at = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
        self._step = 0
        self._history: list[Measured] = []
        self._best: dict[str, torch.Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or early stopping ends the run."""
        return self._step >= self._config.steps or self._is_stuck

    @property
    def _is_stuck(self) -> bool:
        if self._config.patience is None or not self._history:
            return False
        return len(self._history) - 1 - best_of(self._history) >= self._config.patience

    def step(self) -> TrainingProgress:
        """One step of the optimiser, and a measurement where one is due."""
        started = time.perf_counter()
        work = self._work
        lessons = [work.training[row] for row in self._batches.at(self._step)]
        self._step += 1
        loss = self._backward(lessons)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        speed = sum(lesson.num_fed for lesson in lessons) / (time.perf_counter() - started)
        score = None
        if self._step in self._measured_at:
            score = measure(work.model, work.prefix, work.objective, work.validation)
            self._history.append(Measured(self._step, loss, score))
            if best_of(self._history) == len(self._history) - 1:
                self._best = clone_state(work.prefix)
        return TrainingProgress(self._step, loss, speed, score)

    def _backward(self, lessons: Sequence[Lesson]) -> float:
        work = self._work
        self._optimizer.zero_grad(set_to_none=True)
        examples = [example for lesson in lessons for example in lesson.examples]
        with recomputing(work.model, wanted=self._recomputes):
            logits, targets = target_logits(work.model, work.prefix, examples)
            loss = work.objective.losses(logits, targets, lessons).mean()
            value = loss.item()
            if not math.isfinite(value):
                raise InvalidTrainingData(
                    f"The loss is {value} at step {self._step}.",
                    remedy="Lower the learning rate; a tenth of it often does.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
        return value

    def state(self) -> TrainingCheckpoint:
        """Everything that the next step depends on."""
        return TrainingCheckpoint(
            self._step, clone_state(self._work.prefix), self._best, self._optimizer.state_dict(), tuple(self._history)
        )

    def restore(self, kept: TrainingCheckpoint) -> None:
        """Go on from there."""
        self._step, self._best, self._history = kept.step, kept.best, list(kept.history)
        self._work.prefix.load_state_dict(kept.parameters)
        self._optimizer.load_state_dict(kept.optimizer)
        self._schedule.last_epoch = kept.step

    def result(self) -> TrainingResult:
        """The best measured state, which the prefix is put into."""
        self._work.prefix.load_state_dict(self._best)
        best = self._history[best_of(self._history)]
        return TrainingResult(self._work.prefix.saved(), best.step, best.score, tuple(self._history))


@torch.no_grad()
def measure(
    model: FrozenModel, prefix: LearnedPrefix | None, objective: Objective, lessons: Sequence[Lesson]
) -> TeacherForcedScore:
    """Teacher-forced loss and hits, in one forward for each batch, without generating."""
    total, count, hits = 0.0, 0, 0
    ordered = sorted(lessons, key=lambda lesson: lesson.num_fed)
    for start in range(0, len(ordered), MEASURED_TOGETHER):
        batch = ordered[start : start + MEASURED_TOGETHER]
        logits, targets = target_logits(model, prefix, [example for lesson in batch for example in lesson.examples])
        losses = objective.losses(logits, targets, batch)
        total += float(losses.sum())
        count += len(losses)
        hits += objective.hits(logits, targets, batch)
    return TeacherForcedScore(loss=total / count, exact_match=hits / len(ordered))


def make_optimizer(
    config: TrainingConfig, parameters: Sequence[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or Adafactor (Shazeer and Stern 2018), both without weight decay."""
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(config.steps * config.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))
