"""Prompt tuning (Lester et al. 2021) on the frozen model: only the virtual tokens have gradients.

Rows travel as one flat row through the same modules and the same attention function as in serving; there is no padding
outside the attention and no mask. What is trained is therefore what is served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from server.engine.attention import PackedRows
from server.engine.model import FrozenModel
from server.engine.operators import at_least_float32
from server.errors import InvalidTrainingData
from server.train.data import Example


@dataclass(frozen=True)
class TrainingConfig:
    """Hyperparameters; the defaults are those that our shipped soft prompts were trained with."""

    num_virtual_tokens: int = 20
    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 2e-2
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    init: str = "vocab"
    seed: int = 0
    evaluations: int = 10
    """How often the validation rows are measured on the way; the best of these states is kept."""

    def as_dict(self) -> dict[str, object]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """What a step tells whoever watches."""

    step: int
    loss: float
    tokens_per_second: float
    validation: Score | None = None


@dataclass(frozen=True)
class Score:
    """Teacher-forced quality on a set of rows."""

    loss: float
    """Mean cross-entropy per target token, in nats."""
    exact_match: float
    """Share of rows whose every target token, the end token included, is the most likely one: exactly the rows that
    greedy decoding answers with the target."""


@dataclass(frozen=True)
class TrainingResult:
    """The trained virtual tokens `[num_virtual_tokens, hidden_size]` in float32, and how they scored."""

    prompt_embeddings: torch.Tensor
    step: int
    validation: Score


def train(
    model: FrozenModel,
    initial: torch.Tensor,
    training: Sequence[Example],
    validation: Sequence[Example],
    config: TrainingConfig,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> TrainingResult:
    """Train virtual tokens and answer the state that scored best on the validation rows.

    Raises:
        InvalidTrainingData: the loss is not finite any more; what was trained until then is lost with it.
    """
    prompt_embeddings = torch.nn.Parameter(initial.to(model.device, torch.float32).clone())
    optimizer = torch.optim.AdamW([prompt_embeddings], lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, config))
    batches = _batches(training, config.batch_size, config.seed)
    measure_at = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)} | {
        config.steps
    }
    best: TrainingResult | None = None
    for step in range(1, config.steps + 1):
        started = time.perf_counter()
        batch = next(batches)
        loss = batch_loss(model, prompt_embeddings, batch).mean()
        if not math.isfinite(loss.item()):
            raise InvalidTrainingData(
                f"The loss is {loss.item()} at step {step}.",
                remedy="Lower the learning rate; a tenth of it often does.",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([prompt_embeddings], config.max_grad_norm)
        optimizer.step()
        schedule.step()
        tokens = sum(len(example.fed_ids) + config.num_virtual_tokens for example in batch)
        speed = tokens / (time.perf_counter() - started)
        score = None
        if step in measure_at:
            score = evaluate_teacher_forced(model, prompt_embeddings.detach(), validation)
            if best is None or (score.exact_match, -score.loss) > (best.validation.exact_match, -best.validation.loss):
                best = TrainingResult(prompt_embeddings.detach().cpu().clone(), step, score)
        on_step(Progress(step, float(loss.detach()), speed, score))
    assert best is not None, "the last step is always measured"
    return best


def batch_loss(model: FrozenModel, prompt_embeddings: torch.Tensor, batch: Sequence[Example]) -> torch.Tensor:
    """Cross-entropy of every target token of a batch, `[target tokens]`, in nats."""
    logits, targets = _target_logits(model, prompt_embeddings, batch)
    return F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def evaluate_teacher_forced(
    model: FrozenModel, prompt_embeddings: torch.Tensor, examples: Sequence[Example], batch_size: int = 32
) -> Score:
    """Loss and exact match in one forward per batch, without generating."""
    total, tokens, exact = 0.0, 0, 0
    ordered = sorted(examples, key=lambda example: len(example.fed_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        logits, targets = _target_logits(model, prompt_embeddings, batch)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
        hits = torch.split(logits.argmax(dim=-1) == targets, [len(example.target_ids) for example in batch])
        exact += sum(bool(row.all()) for row in hits)
    return Score(loss=total / tokens, exact_match=exact / len(ordered))


def _target_logits(
    model: FrozenModel, prompt_embeddings: torch.Tensor, batch: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[target tokens, vocab_size]` that predict the targets, and the targets themselves."""
    n = prompt_embeddings.shape[0]
    virtual = prompt_embeddings.to(model.dtype)
    device = model.device
    embedded = model.embed(torch.tensor([i for example in batch for i in example.fed_ids], device=device))
    pieces: list[torch.Tensor] = []
    for tokens in torch.split(embedded, [len(example.fed_ids) for example in batch]):
        pieces += (virtual, tokens)
    lengths = [n + len(example.fed_ids) for example in batch]
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])
    keep: list[int] = []
    start = 0
    for example, length in zip(batch, lengths, strict=True):
        keep += range(start + length - len(example.target_ids), start + length)
        start += length
    logits = model.forward(torch.cat(pieces), position_ids, PackedRows(lengths), torch.tensor(keep, device=device))
    return at_least_float32(logits), torch.tensor([i for example in batch for i in example.target_ids], device=device)


def _learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(config.steps * config.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))


def _batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches; every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in queue[:batch_size]]
        queue = queue[batch_size:]
