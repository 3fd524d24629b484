"""Pruning: which virtual tokens can be removed without a loss of quality.

Removals interact, because two virtual tokens may stand in for each other. So after leave one out, virtual tokens are
removed one after another, the least needed first, and each removal is tried beside all earlier ones. Every choice is
made on one half of the rows. The other half, which no choice has seen, shows what was lost.

Both kinds of soft prompt can be cut: a row is one virtual token, either an input embedding or the keys and values of
all layers. Removed positions are not left empty, so the input moves forward, and with a KV prefix comes nearer to keys
that stay as they are. The evaluation includes this effect, because it asks the shortened soft prompt as it is served.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from server.errors import InvalidRequest
from server.evaluation.data import EvaluationData
from server.evaluation.intervals import Bootstrap, Estimate, Statistic
from server.interpret.necessity import necessity
from server.interpret.results import Interval, Necessity, Result
from server.interpret.variants import changed
from server.soft_prompts.soft_prompt import SoftPrompt
from server.soft_prompts.start import START_FIELD, declared_start
from server.train.rows import Rows

PRUNED_FIELD = "pruned"
LEAST_ROWS = 20
SEED = 0
SUBJECT = "the whole soft prompt"

Ask = Callable[[Sequence[tuple[str, SoftPrompt]], EvaluationData], Mapping[str, Statistic]]
"""Has soft prompts answer rows; returns the quality of each by its name. Larger is better."""


class RemovalStep(Result):
    """A virtual token whose removal was tried beside all earlier removals."""

    token: int
    loss: float
    """Loss of quality on the choosing rows, of this and all earlier removals together."""
    removed: bool


class Pruning(Result):
    """Which virtual tokens remain, and what the others were worth."""

    num_virtual_tokens: int
    kept: tuple[int, ...]
    """Positions of the remaining virtual tokens, ascending."""
    tolerance: float
    """The largest loss of quality that the interval may contain."""
    choosing_rows: int
    judging_rows: int
    alone: Necessity
    """Leave one out, on the choosing rows."""
    steps: tuple[RemovalStep, ...]
    whole: Interval | None = None
    """Quality on the judging rows; None if nothing can be removed."""
    shortened: Interval | None = None
    loss: Interval | None = None
    """By the removals, on the same judging rows."""

    @property
    def removed(self) -> tuple[int, ...]:
        """Positions of the removed virtual tokens, ascending."""
        return tuple(sorted(set(range(self.num_virtual_tokens)) - set(self.kept)))

    @property
    def is_shown(self) -> bool:
        """Whether the judging rows show that the loss is within the tolerance."""
        return self.loss is not None and self.loss.high <= self.tolerance


def pruning_verdict(found: Pruning) -> str:
    """Whether there is a shortened soft prompt, in words."""
    removed, loss = found.removed, found.loss
    if loss is None:
        return "None of the virtual tokens can be removed: each removal loses more than half of the tolerance."
    tokens = f"Virtual token{'s' if len(removed) > 1 else ''} {', '.join(map(str, removed))}"
    measured = f"the loss on other rows is {loss.value:.3f} (95 % interval {loss.low:.3f} to {loss.high:.3f})"
    if found.is_shown:
        return f"{tokens} can be removed: {measured}, within the tolerance of {found.tolerance:g}."
    remedy = "Nothing is published; more rows make the interval smaller, and --tolerance sets the limit."
    return f"{tokens} cannot be shown to be superfluous: {measured}, and the tolerance is {found.tolerance:g}. {remedy}"


def most_questions(soft_prompt: SoftPrompt, rows: int) -> int:
    """The largest number of answers that `prune` has given: rows times soft prompts."""
    return (rows // 2) * (2 * soft_prompt.num_virtual_tokens) + 2 * (rows - rows // 2)


def prune(soft_prompt: SoftPrompt, data: EvaluationData, ask: Ask, tolerance: float) -> Pruning:
    """Choose virtual tokens to remove on one half of the rows, and judge the removal on the other half.

    Args:
        soft_prompt: of either kind.
        data: the rows.
        ask: has soft prompts answer rows.
        tolerance: the largest acceptable loss of quality. Half of it is for the choice, because the quality on the
            judging rows varies by chance.

    Raises:
        InvalidRequest: there are too few rows, or there is only one virtual token.
    """
    count = soft_prompt.num_virtual_tokens
    if count < 2:
        raise InvalidRequest("The soft prompt has only one virtual token.", remedy="Train one with more.")
    choosing, judging = halves(data)
    alone = {index: without(range(count), index) for index in range(count)}
    named = [(SUBJECT, changed(soft_prompt, soft_prompt.tensor)), *_cuts(soft_prompt, alone)]
    answered = ask(named, choosing)
    whole = answered[SUBJECT]
    bootstrap = Bootstrap(len(choosing.rows))
    loo = necessity(bootstrap, whole, {index: answered[_name(index)] for index in alone}, "nothing")
    losses = {one.token: one.loss.value for one in loo.tokens}
    kept, steps = tuple(range(count)), []
    for index in sorted((one for one in losses if losses[one] <= tolerance / 2), key=lambda one: losses[one]):
        if len(kept) == 1:
            break
        tried = without(kept, index)
        if len(kept) == count:
            loss = losses[index]
        else:
            loss = whole.value - ask(_cuts(soft_prompt, {index: tried}), choosing)[_name(index)].value
        steps.append(RemovalStep(token=index, loss=loss, removed=loss <= tolerance / 2))
        kept = tried if steps[-1].removed else kept
    found = Pruning(
        num_virtual_tokens=count,
        kept=kept,
        tolerance=tolerance,
        choosing_rows=len(choosing.rows),
        judging_rows=len(judging.rows),
        alone=loo,
        steps=tuple(steps),
    )
    return found if len(kept) == count else _judged(found, soft_prompt, judging, ask)


def _judged(found: Pruning, soft_prompt: SoftPrompt, judging: EvaluationData, ask: Ask) -> Pruning:
    cut = ("shortened", changed(soft_prompt, soft_prompt.tensor[list(found.kept)]))
    answered = ask([(SUBJECT, changed(soft_prompt, soft_prompt.tensor)), cut], judging)
    bootstrap = Bootstrap(len(judging.rows))
    whole, shortened = answered[SUBJECT], answered["shortened"]
    figures = {
        "whole": _interval(bootstrap.estimate(whole)),
        "shortened": _interval(bootstrap.estimate(shortened)),
        "loss": _interval(bootstrap.difference(shortened, whole)),
    }
    return found.model_copy(update=figures)


def halves(data: EvaluationData) -> tuple[EvaluationData, EvaluationData]:
    """Rows to choose by and rows to judge by: drawn at random, with equal shares of each label.

    Raises InvalidRequest if there are too few.
    """
    if len(data.rows) < LEAST_ROWS:
        raise InvalidRequest(
            f"{len(data.rows)} rows are too few: half of them choose virtual tokens, the other half judges the result.",
            remedy=f"Give at least {LEAST_ROWS} rows; some hundred show a difference of a few points.",
        )
    order = random.Random(SEED).sample(range(len(data.rows)), len(data.rows))
    if data.labels:
        order.sort(key=lambda index: data.rows[index].target.strip())
    parts = (sorted(order[1::2]), sorted(order[::2]))
    one, other = (
        replace(
            data,
            rows=Rows(data.rows[index] for index in part),
            references=tuple(data.references[index] for index in part),
        )
        for part in parts
    )
    return one, other


def shortened(soft_prompt: SoftPrompt, found: Pruning, source: str, data: EvaluationData) -> SoftPrompt:
    """The soft prompt of the remaining virtual tokens; its manifest records where it comes from.

    Args:
        soft_prompt: the whole one.
        found: what remains of it.
        source: the whole one's name, such as `task@3`.
        data: the rows that chose and judged.
    """
    manifest, kept = soft_prompt.manifest, list(found.kept)
    record: dict[str, Any] = {
        "from": source,
        "from_digest": soft_prompt.digest,
        "num_virtual_tokens": found.num_virtual_tokens,
        "kept": kept,
        "tolerance": found.tolerance,
        "data_sha256": data.sha256,
    }
    training = {**(manifest.training or {}), PRUNED_FIELD: record}
    start = declared_start(manifest)
    if start is not None:
        training[START_FIELD] = start.after_removal(found.num_virtual_tokens, kept).as_dict()
    update = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "num_virtual_tokens": len(kept),
        "training": training,
        "metrics": _metrics(found),
        "digest": None,
        "prefix_hash": None,
    }
    tensor: torch.Tensor = soft_prompt.tensor[kept].contiguous()
    plain = SoftPrompt(soft_prompt.peft_type, tensor, manifest.model_copy(update=update))
    identities = {"digest": plain.digest, "prefix_hash": plain.prefix_hash}
    return SoftPrompt(soft_prompt.peft_type, tensor, plain.manifest.model_copy(update=identities))


def _metrics(found: Pruning) -> dict[str, Any]:
    """Figures on the judging rows; those of the whole soft prompt do not hold any more."""
    assert found.whole is not None, "it has been judged"
    assert found.shortened is not None, "as above"
    assert found.loss is not None, "as above"
    return {
        "pruning_quality": round(found.shortened.value, 4),
        "pruning_quality_before": round(found.whole.value, 4),
        "pruning_loss": round(found.loss.value, 4),
        "pruning_loss_interval": [round(found.loss.low, 4), round(found.loss.high, 4)],
        "pruning_rows": found.judging_rows,
    }


def without(kept: Sequence[int], index: int) -> tuple[int, ...]:
    """The positions but one."""
    return tuple(one for one in kept if one != index)


def _cuts(soft_prompt: SoftPrompt, kept: Mapping[int, tuple[int, ...]]) -> list[tuple[str, SoftPrompt]]:
    return [(_name(index), changed(soft_prompt, soft_prompt.tensor[list(rows)])) for index, rows in kept.items()]


def _name(index: int) -> str:
    return f"without {index}"


def _interval(of: Estimate) -> Interval:
    return Interval(value=of.value, low=of.low, high=of.high)
