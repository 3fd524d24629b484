"""How alike tasks are: cosines of what training changed, never of the values themselves.

Soft prompts that began alike are alike in their values, whatever they learned, so raw cosines are reported only beside
the cosines of changes, and shared starts are marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.interpret.p_values import DRAWS, p_values
from server.interpret.results import Similarity, TaskPair
from server.soft_prompts.start import TrainingStart

SEED = 0
THROUGH_THE_MODEL = (
    "Input embeddings change the values through the model, which makes even random changes from one start alike "
    "(cosines about 0.7 in the embedded model). A pair of them has no p-value."
)


@dataclass(frozen=True)
class TaskValues:
    """What is compared of one task.

    Attributes:
        name: the task.
        values: mean values `[layers, kv_heads * head_dim]`.
        change: mean value changes of the same shape; None if the start is unknown.
        start: as declared.
        shifts: `[probes, hidden_size]`, shifts of the last hidden state; None if they were not measured.
        is_kv_prefix: whether the values are its own; those of input embeddings are computed by the model.
    """

    name: str
    values: torch.Tensor
    change: torch.Tensor | None = None
    start: TrainingStart | None = None
    shifts: torch.Tensor | None = None
    is_kv_prefix: bool = True


def similarity(tasks: Sequence[TaskValues]) -> Similarity:
    """Compare each pair of tasks."""
    pairs = tuple(_pair(one, other) for one, other in itertools.combinations(tasks, 2))
    reliability = tuple(split_half(task.shifts) for task in tasks if task.shifts is not None)
    unknown = [task.name for task in tasks if task.change is None]
    notes: tuple[str, ...] = (
        (f"The start of {', '.join(unknown)} is unknown: no change can be compared.",) if unknown else ()
    )
    if any(pair.change is not None and pair.p_change is None for pair in pairs):
        notes += (THROUGH_THE_MODEL,)
    return Similarity(tasks=tuple(task.name for task in tasks), pairs=pairs, reliability=reliability, notes=notes)


def _pair(one: TaskValues, other: TaskValues) -> TaskPair:
    change, p = None, None
    if one.change is not None and other.change is not None:
        change = _cosine(one.change, other.change)
        if one.is_kv_prefix or other.is_kv_prefix:
            p = float(p_values(torch.tensor([change]), _null(one.change, other.change)))
    function = None
    if one.shifts is not None and other.shifts is not None:
        function = _cosine(one.shifts.mean(0), other.shifts.mean(0))
    return TaskPair(
        one=one.name,
        other=other.name,
        change=change,
        p_change=p,
        raw=_cosine(one.values, other.values),
        shares_start=share_start(one.start, other.start),
        function=function,
    )


def share_start(one: TrainingStart | None, other: TrainingStart | None) -> bool:
    """Whether at least half of the virtual tokens of the shorter one began as tokens of the other."""
    if one is None or other is None:
        return False
    ids, others = set(one.remaining_token_ids), set(other.remaining_token_ids)
    if ids and others:
        return 2 * len(ids & others) >= min(len(ids), len(others))
    return (one.prefix_hash, one.token_ids_sha256) == (other.prefix_hash, other.token_ids_sha256)


def split_half(shifts: torch.Tensor) -> float:
    """Cosine of the mean shifts of two halves of the probes `[probes, d]`: how exactly the shift is measured."""
    return _cosine(shifts[::2].mean(0), shifts[1::2].mean(0))


def _null(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosines `[DRAWS]` of the other change with Gaussian changes that have the one's norm in each layer."""
    generator = torch.Generator().manual_seed(SEED)
    width = one.shape[1]
    weights = one.norm(dim=1).double().cpu() / width**0.5
    drawn = torch.randn(DRAWS, *one.shape, generator=generator).double() * weights[None, :, None]
    return F.cosine_similarity(drawn.flatten(1), other.double().cpu().flatten()[None], dim=1)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))
