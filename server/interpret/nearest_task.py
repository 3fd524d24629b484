"""The published task that is nearest by function, to start a training from (SPoT, Vu et al. 2022).

What a soft prompt does predicts transfer, where it lies does not (Su et al. 2022). A task without a soft prompt does
nothing yet, so it is first trained briefly from the usual start. The cosine of what this soft prompt and a published
one do to the last hidden state, on fixed probes, says how near they are. A published one counts only if the brief
training moved towards it: its cosine with the untrained start is lower, also where probes are drawn again.

The nearest may still be a worse start than the usual one (benchmarks/RESULTS.md has such a task). So the same brief
training is run from it too, and it is taken only if its validation loss is then lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidSoftPrompt
from server.interpret.function import PROBES, last_states
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.config import NEAREST_TASK, TrainingConfig
from server.train.data import DataFile
from server.train.inputs import FoundStart, TaskFiles, TaskRows
from server.train.methods import join_key_values
from server.train.output import Trained
from server.train.start import begin
from server.train.train_task import train_task

BRIEF_STEPS = 20
BRIEF_RATE = {"prompt_tuning": 0.02, "prefix_tuning": 0.008, "p_tuning": 0.001}
"""Learning rates of the brief training where the run searches for its own."""
MOST_CANDIDATES = 32
COMPARED_ROWS = 64
"""Validation rows on which two starts are compared after brief training."""
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class NearestTask:
    """The choice of a start, in words too."""

    name: str | None
    """None: no published task is both nearer than chance and a better start."""
    sentence: str
    similarities: Mapping[str, float] = field(default_factory=dict)
    directory: Path | None = None


def with_start(
    model: FrozenModel,
    files: TaskFiles,
    config: TrainingConfig,
    rows: TaskRows,
    candidates: Mapping[str, Path],
    say: Callable[[str], None],
) -> tuple[TaskFiles, TrainingConfig]:
    """Files and configuration of the run that starts from the nearest task, or from the usual start.

    Without `init=nearest-task` both are returned unchanged.

    Args:
        model: the frozen model.
        files: of the task.
        config: of the run.
        rows: of the task.
        candidates: PEFT directories of published tasks, by name.
        say: takes the sentence that says which task was chosen, and why.
    """
    if config.init != NEAREST_TASK:
        return files, config
    found = nearest_task(model, files, config, rows, candidates)
    say(found.sentence)
    if found.name is None:
        return files, replace(config, init="auto")
    start = FoundStart(found.name, found.similarities[found.name])
    return (
        replace(files, start=found.directory, found_start=start),
        replace(config, init="soft_prompt", init_from=found.name),
    )


def nearest_task(
    model: FrozenModel, files: TaskFiles, config: TrainingConfig, rows: TaskRows, candidates: Mapping[str, Path]
) -> NearestTask:
    """Look for the nearest of the published tasks that have the same kind and length; see `with_start`."""
    fitting = _fitting(model, config, candidates)
    if not fitting:
        kind = f"{config.num_virtual_tokens} virtual tokens of {config.method}"
        return NearestTask(None, f"No published task has {kind}: training begins as usual.")
    usual = replace(config, init="auto")
    initial, _ = begin(model, usual, rows.training[0], config.labels or rows.labels[0], None)
    values = initial if isinstance(initial, torch.Tensor) else join_key_values(initial)
    untrained = SoftPrompt(config.peft_type, values.detach().float().cpu())
    alone = _states(model, None)
    before = _states(model, untrained) - alone
    brief = _brief(model, files, usual, rows)
    after = _states(model, brief.soft_prompt) - alone
    similarities: dict[str, float] = {}
    moved: list[str] = []
    for name, (_, soft_prompt) in fitting.items():
        shift = _states(model, soft_prompt) - alone
        similarities[name] = float(F.cosine_similarity(after.mean(0), shift.mean(0), dim=0))
        if _moved_towards(before, after, shift):
            moved.append(name)
    said = ", ".join(f"{name} {value:.2f}" for name, value in sorted(similarities.items(), key=lambda one: -one[1]))
    if not moved:
        sentence = f"Brief training moved towards no published task ({said}): training begins as usual."
        return NearestTask(None, sentence, similarities)
    best = max(moved, key=lambda name: similarities[name])
    directory = fitting[best][0]
    spot = replace(usual, init="soft_prompt", init_from=best)
    losses = [one.result.validation.loss for one in (_brief(model, replace(files, start=directory), spot, rows), brief)]
    measured = (
        f"After {min(BRIEF_STEPS, config.steps)} steps the validation loss is {losses[0]:.3f} from {best}, the nearest "
        f"task by function (cosine: {said}), and {losses[1]:.3f} from the usual start"
    )
    if losses[0] >= losses[1]:
        return NearestTask(None, f"{measured}: training begins as usual.", similarities)
    return NearestTask(best, f"{measured}: training begins with {best}.", similarities, directory)


def _fitting(
    model: FrozenModel, config: TrainingConfig, candidates: Mapping[str, Path]
) -> dict[str, tuple[Path, SoftPrompt]]:
    found = {}
    for name, directory in candidates.items():
        try:
            loaded = load_soft_prompts(directory, model.spec, config.num_virtual_tokens)
        except InvalidSoftPrompt:  # longer, of another model, or broken
            continue
        is_alike = loaded[0].is_kv_prefix == (config.method == "prefix_tuning")
        if len(loaded) == 1 and is_alike and loaded[0].num_virtual_tokens == config.num_virtual_tokens:
            found[name] = (directory, loaded[0])
        if len(found) == MOST_CANDIDATES:
            break
    return found


def _brief(model: FrozenModel, files: TaskFiles, config: TrainingConfig, rows: TaskRows) -> Trained:
    steps = min(BRIEF_STEPS, config.steps)
    rate = BRIEF_RATE[config.method] if config.learning_rate == "auto" else config.learning_rate
    brief = replace(config, steps=steps, evaluations=1, patience=None, learning_rate=rate)
    some = TaskRows(
        _first(rows.training, steps * config.batch_size), _first(rows.validation, COMPARED_ROWS), rows.labels
    )
    return train_task(model, files, brief, rows=some)


def _first(files: Sequence[DataFile], count: int) -> tuple[DataFile, ...]:
    return tuple(replace(data, rows=data.rows[:count]) for data in files)


def _states(model: FrozenModel, soft_prompt: SoftPrompt | None) -> torch.Tensor:
    """Last hidden states on the probes, `[probes, hidden_size]` in float64."""
    rows = [model.text.encode(f"{probe}\n") for probe in PROBES]
    return last_states(model, rows, soft_prompt).double().cpu()


def _moved_towards(before: torch.Tensor, after: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the cosine to the target grew, in 97.5 % of the draws of probes."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(target), (RESAMPLES, len(target)), generator=generator)
    shares = F.one_hot(drawn, len(target)).double().mean(1)
    mean_before, mean_after, mean_target = shares @ before, shares @ after, shares @ target
    grown = F.cosine_similarity(mean_after, mean_target) - F.cosine_similarity(mean_before, mean_target)
    return float(grown.quantile(0.025)) > 0
