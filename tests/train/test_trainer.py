from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidTrainingData
from server.train.config import Method, TrainingConfig
from server.train.methods import PromptTuning, build_prefix
from server.train.objectives import Targets
from server.train.run_history import TeacherForcedScore, TrainingProgress, TrainingResult, best_of
from server.train.trainer import TrainingProblem, learning_rate_factor, measure, train
from tests.support import tiny_model, weights_hash
from tests.train.rows import LEARNS, MOODS, examples_of, initial_values, lessons_of, random_embeddings, work_of

PEAK = 0.3


def run(model: FrozenModel, config: TrainingConfig) -> tuple[TrainingResult, list[TrainingProgress]]:
    """Train on MOODS."""
    progress: list[TrainingProgress] = []
    prefix = build_prefix(config, initial_values(model, config, ("yes", "no")), 1)
    return train(work_of(model, prefix), config, PEAK, progress.append), progress


def score(model: FrozenModel, embeddings: torch.Tensor) -> TeacherForcedScore:
    """How virtual tokens do on MOODS."""
    return measure(model, PromptTuning(embeddings), Targets(), lessons_of(examples_of(model)))


def test_training_teaches_a_frozen_random_model_a_task(tiny32: FrozenModel) -> None:
    result, progress = run(tiny32, LEARNS)
    assert [p.step for p in progress] == list(range(1, LEARNS.steps + 1))
    assert progress[-1].loss < 0.2 * progress[0].loss
    assert result.validation.exact_match == 1.0
    assert score(tiny32, result.prompt_embeddings) == result.validation


def test_the_same_seed_gives_the_same_soft_prompt_bit_for_bit(tiny32: FrozenModel) -> None:
    config = replace(LEARNS, steps=12, batch_size=3)
    first, again = run(tiny32, config)[0], run(tiny32, config)[0]
    other = run(tiny32, replace(config, seed=1))[0]
    assert torch.equal(first.prompt_embeddings, again.prompt_embeddings)
    assert first.validation == again.validation
    assert not torch.equal(first.prompt_embeddings, other.prompt_embeddings)


def test_training_writes_to_no_weight_and_leaves_no_gradient() -> None:
    model = tiny_model(dtype=torch.float32)
    before = weights_hash(model.module)
    initial = random_embeddings(model)
    kept = initial.clone()
    result = train(work_of(model, initial), replace(LEARNS, steps=5), PEAK)
    assert weights_hash(model.module) == before
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())
    assert torch.equal(initial, kept)
    assert not torch.equal(result.prompt_embeddings, kept)


def test_the_best_measured_state_is_kept_not_the_last(tiny32: FrozenModel) -> None:
    taught = run(tiny32, LEARNS)[0].prompt_embeddings
    opposite = examples_of(tiny32, [(text, "no" if target == "yes" else "yes") for text, target in MOODS])
    progress: list[TrainingProgress] = []
    config = replace(LEARNS, steps=30, evaluations=10)
    result = train(work_of(tiny32, taught, opposite, examples_of(tiny32)), config, PEAK, progress.append)
    measured = {p.step: p.validation for p in progress if p.validation}
    assert sorted(measured) == list(range(3, 31, 3))
    best = max(measured, key=lambda step: (measured[step].exact_match, -measured[step].loss))
    assert best < 30
    assert (result.step, result.validation) == (best, measured[best])
    assert score(tiny32, result.prompt_embeddings) == measured[best]


def test_the_last_step_is_measured_even_where_evaluations_do_not_divide_the_steps(tiny32: FrozenModel) -> None:
    _, progress = run(tiny32, replace(LEARNS, steps=7, evaluations=3))
    assert [p.step for p in progress if p.validation] == [2, 5, 7]


def test_the_learning_rate_warms_up_to_its_peak_and_then_falls_towards_zero() -> None:
    factors = [learning_rate_factor(step, TrainingConfig(steps=100, warmup_ratio=0.1)) for step in range(100)]
    assert factors[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.02


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_with_a_remedy(tiny32: FrozenModel) -> None:
    initial = random_embeddings(tiny32).fill_(float("inf"))
    with pytest.raises(InvalidTrainingData, match=r"The loss is nan at step 1\. Lower the learning rate"):
        train(work_of(tiny32, initial), replace(LEARNS, steps=3), PEAK)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(
    tiny32: FrozenModel, tmp_path: Path, method: Method, optimizer: Any
) -> None:
    config = replace(LEARNS, steps=9, evaluations=3, batch_size=3, method=method, optimizer=optimizer)

    def work() -> TrainingProblem:
        return work_of(tiny32, build_prefix(config, initial_values(tiny32, config, None), 1))

    whole = train(work(), config, 0.05)

    def break_off(progress: TrainingProgress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(work(), config, 0.05, break_off, checkpoint=tmp_path)
    steps: list[int] = []
    resumed = train(work(), config, 0.05, lambda progress: steps.append(progress.step), checkpoint=tmp_path)
    assert steps == [7, 8, 9], "it goes on behind the last checkpoint, which is written with each measurement"
    assert resumed.history == whole.history
    assert torch.equal(resumed.prompt_embeddings, whole.prompt_embeddings)


def test_a_run_that_is_over_is_not_run_again(tiny32: FrozenModel, tmp_path: Path) -> None:
    config = replace(LEARNS, steps=4, evaluations=2)
    first = train(work_of(tiny32, random_embeddings(tiny32)), config, PEAK, checkpoint=tmp_path)

    def no_step(progress: TrainingProgress) -> None:
        raise AssertionError("a step was run")

    again = train(work_of(tiny32, random_embeddings(tiny32)), config, PEAK, no_step, checkpoint=tmp_path)
    assert torch.equal(again.prompt_embeddings, first.prompt_embeddings)


def test_training_stops_once_measurements_get_no_better(tiny32: FrozenModel) -> None:
    taught = run(tiny32, LEARNS)[0].prompt_embeddings
    opposite = examples_of(tiny32, [(text, "no" if target == "yes" else "yes") for text, target in MOODS])
    config = replace(LEARNS, steps=60, evaluations=20, patience=3)
    result = train(work_of(tiny32, taught, opposite, examples_of(tiny32)), config, PEAK)
    best = best_of(result.history)
    assert len(result.history) < 20
    assert len(result.history) - 1 - best == 3
    assert result.validation == result.history[best].score


LEARNED = 0.2
"""Of the first loss, what is left of it at most. (That all rows come out right depends on the order of sums.)"""


def learned_share(model: FrozenModel, config: TrainingConfig, peak: float) -> float:
    """What is left of the first loss after a run on MOODS."""
    work = work_of(model, build_prefix(config, initial_values(model, config, None), 1))
    before = measure(model, work.prefix, work.objective, work.validation)
    return train(work, config, peak).validation.loss / before.loss


def test_every_method_and_optimiser_learns(tiny32: FrozenModel) -> None:
    assert learned_share(tiny32, replace(LEARNS, method="p_tuning"), 0.02) < LEARNED
    assert learned_share(tiny32, replace(LEARNS, method="prefix_tuning"), 0.1) < LEARNED
    assert learned_share(tiny32, replace(LEARNS, optimizer="adafactor"), PEAK) < LEARNED


def test_multitask_training_teaches_each_task_its_own(tiny32: FrozenModel) -> None:
    config = replace(LEARNS, method="multitask_prompt_tuning", steps=300, batch_size=8)
    prefix = build_prefix(config, initial_values(tiny32, config, None), 2)
    opposite = examples_of(tiny32, [(text, "no" if target == "yes" else "yes") for text, target in MOODS])
    examples = [*examples_of(tiny32), *(replace(example, task=1) for example in opposite)]
    result = train(work_of(tiny32, prefix, examples), config, PEAK)
    shared, cols, rows = (result.tensors[k] for k in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
    unfolded = [PromptTuning(shared * (cols[task] @ rows[task])) for task in (0, 1)]
    for task, (own, other) in enumerate(((examples_of(tiny32), opposite), (opposite, examples_of(tiny32)))):
        right = measure(tiny32, unfolded[task], Targets(), lessons_of(own))
        wrong = measure(tiny32, unfolded[task], Targets(), lessons_of(other))
        assert right.exact_match > wrong.exact_match
        assert right.loss < 0.5 * wrong.loss


def test_whether_activations_are_computed_again_is_decided_once_by_the_largest_step(
    tiny32: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free changes with every step, because the run's own allocator keeps what it has freed."""
    asked, decided = [], []

    def free_memory(device: torch.device) -> int:
        asked.append(device)
        return 2**60 if len(asked) == 1 else 0

    @contextlib.contextmanager
    def recomputing(model: FrozenModel, *, wanted: bool) -> Iterator[None]:
        decided.append(wanted)
        yield

    monkeypatch.setattr("server.train.recompute.free_memory", free_memory)
    monkeypatch.setattr("server.train.trainer.recomputing", recomputing)
    train(work_of(tiny32, random_embeddings(tiny32)), replace(LEARNS, steps=4, recompute="auto"), PEAK)
    assert len(asked) == 1
    assert decided == [False] * 4


def test_computing_activations_again_changes_no_bit(tiny32: FrozenModel) -> None:
    kept = train(work_of(tiny32, random_embeddings(tiny32)), replace(LEARNS, steps=4, recompute=False), PEAK)
    again = train(work_of(tiny32, random_embeddings(tiny32)), replace(LEARNS, steps=4, recompute=True), PEAK)
    assert torch.equal(kept.prompt_embeddings, again.prompt_embeddings)
    assert not any(module.training for module in tiny32.module.modules())
