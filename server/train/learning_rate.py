"""The search for a learning rate: a few steps at each of several peaks, and the one with the lowest loss.

A soft prompt has few parameters, so good peaks are a hundred times those for weights; they differ more between models
and methods than between tasks. Peaks are compared by their validation loss; a peak whose loss is not finite is
discarded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server.errors import InvalidTrainingData
from server.train.config import TrainingConfig
from server.train.methods import clone_state
from server.train.run_history import TrainingProgress
from server.train.trainer import TrainingProblem, train

PEAKS = {"prompt_tuning": (5e-3, 2e-2, 8e-2), "prefix_tuning": (2e-3, 8e-3, 3e-2)}
PEAKS |= {"p_tuning": (3e-4, 1e-3, 3e-3), "multitask_prompt_tuning": PEAKS["prompt_tuning"]}
BEGUN_AS_TEACHER = (3e-4, 1e-3, 3e-3)
"""Learning rates for a prefix that starts as its teacher's: low, because it is already good."""
SHARE = 0.05
"""Share of the run's steps that each peak is tried for."""
FEWEST, MOST = 10, 60
MEASURED_ROWS = 64


@dataclass(frozen=True)
class Tried:
    """One peak, and the validation loss that it came to."""

    learning_rate: float
    loss: float


def find_learning_rate(
    work: TrainingProblem,
    config: TrainingConfig,
    on_step: Callable[[TrainingProgress], None],
    on_tried: Callable[[Tried], None],
    peaks: Sequence[float] | None = None,
) -> float:
    """Try these peaks, or the method's usual ones, and return the best; the prefix is reset afterwards.

    Raises InvalidTrainingData if none of them came to a finite loss.
    """
    steps = min(MOST, max(FEWEST, round(config.steps * SHARE)))
    short = replace(config, steps=steps, evaluations=1, patience=None)
    small = replace(work, validation=work.validation[:MEASURED_ROWS])
    initial = clone_state(work.prefix)
    tried = []
    for learning_rate in peaks or PEAKS[config.method]:
        try:
            loss = train(small, short, learning_rate, on_step).validation.loss
        except InvalidTrainingData:
            loss = math.inf
        finally:
            work.prefix.load_state_dict(initial)
        tried.append(Tried(learning_rate, loss if math.isfinite(loss) else math.inf))
        on_tried(tried[-1])
    best = min(tried, key=lambda one: one.loss)
    if not math.isfinite(best.loss):
        raise InvalidTrainingData(
            f"The loss is finite with none of {', '.join(f'{one.learning_rate:g}' for one in tried)} as learning rate.",
            remedy="Check the data, or choose a smaller learning rate.",
        )
    return best.learning_rate
