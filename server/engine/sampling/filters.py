"""Applies penalties, biases and filters to logits, each to all rows at once.

Each row has its own rules, but on a device the costs are operators and uploads, not rows. The host therefore lists the
changes that each row's rules make, and uploads the lists of all rows together. The order is transformers': penalties,
biases, forbidden tokens, temperature, top-k, top-p (Holtzman et al. 2020), min-p, typical-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import torch

from server.engine.sampling.seen_tokens import SeenTokens
from server.engine.scheduling.sequence import Sequence
from server.engine.to_device import upload

NEVER = float("-inf")

LARGEST_UNIFORM = 1.0 - 2.0**-52
"""The largest number below 1 whose rounded product with any total is less than that total."""


@dataclass
class Changes:
    """Changes of logits `[rows, vocab_size]` by penalties, biases and bans. Indices are flat, over all rows."""

    vocab_size: int
    penalised: list[tuple[int, float, SeenTokens]] = field(default_factory=list)
    """For each row: its first flat index, its repetition penalty, and the tokens to penalise."""
    biased: list[np.ndarray] = field(default_factory=list)  # flat indices of each row's biases
    biases: list[np.ndarray] = field(default_factory=list)
    forbidden: list[int] = field(default_factory=list)  # flat indices of tokens that must not come next
    masked: list[int] = field(default_factory=list)  # rows with a grammar
    masks: list[np.ndarray] = field(default_factory=list)  # the tokens that their grammars allow, one bit each
    failed: list[int] = field(default_factory=list)  # rows whose rules raised what is in the sequence's `error`

    @classmethod
    def of(cls, sequences: Rows[Sequence], vocab_size: int, eos_token_ids: frozenset[int]) -> Changes:
        """Collect the changes that each row's rules make before the best token is chosen."""
        changes = cls(vocab_size)
        for row, sequence in enumerate(sequences):
            try:
                changes._add(row, sequence, eos_token_ids)
            except Exception as exc:  # noqa: BLE001 - only this request ends
                sequence.error = exc
                changes.failed.append(row)
        return changes

    def __bool__(self) -> bool:
        """Whether there are any changes."""
        return bool(self.penalised or self.biased or self.forbidden or self.masked or self.failed)

    def _add(self, row: int, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
        """Add one row's changes, all or none; raises IndexError for an id whose flat index would be in another row."""
        first, seen, params = row * self.vocab_size, sequence.seen, sequence.sampling
        if seen is not None and not seen.are_within(self.vocab_size):
            raise self._unknown()
        if sequence.walk is not None or params.logit_bias or len(sequence.output_ids) < params.min_new_tokens:
            self._add_others(row, first, sequence, eos_token_ids)
        if seen is not None:
            self.penalised.append((first, params.repetition_penalty, seen))

    def _add_others(self, row: int, first: int, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
        ids, biases = sequence.bias
        mask = None if sequence.walk is None else sequence.walk.allowed_bits()
        ends: frozenset[int] = frozenset()
        # A grammar takes precedence over `min_new_tokens` in deciding when a text may end.
        if mask is None and len(sequence.output_ids) < sequence.sampling.min_new_tokens:
            ends = eos_token_ids | sequence.sampling.stop_token_ids
        bounds = (ids.min(), ids.max()) if len(ids) else ()
        if not all(0 <= token_id < self.vocab_size for token_id in (*bounds, *ends)):
            raise self._unknown()
        if len(ids):
            self.biased.append(first + ids)
            self.biases.append(biases)
        self.forbidden += [first + token_id for token_id in ends]
        if mask is not None:
            self.masked.append(row)
            self.masks.append(mask)

    def _unknown(self) -> IndexError:
        return IndexError(f"token ids must be 0 to {self.vocab_size - 1}")

    def apply(self, logits: torch.Tensor) -> None:
        """Change the logits in place; failed rows become NaN."""
        penalised, *penalties = self._penalties(logits)
        biased, biases = _joined(self.biased, np.int64), _joined(self.biases, np.float64)
        forbidden, masked = (np.array(places, dtype=np.int64) for places in (self.forbidden, self.masked))
        flat, device = logits.view(-1), logits.device
        seen, moved, ends, rows = upload([penalised, biased, forbidden, masked], device)
        if len(seen) or len(moved):
            factor, minus, plus = upload([*penalties, _like(logits, biases)], device)
        if len(seen):
            scores = flat[seen]
            flat.index_copy_(0, seen, torch.where(scores < 0, scores * factor, scores / factor) - minus)
        if len(moved):
            flat.index_add_(0, moved, plus)
        if len(rows) == len(logits):
            logits.masked_fill_(self._denied(device), NEVER)
        elif len(rows):
            logits.index_copy_(0, rows, logits[rows].masked_fill_(self._denied(device), NEVER))
        if len(ends):
            flat.index_fill_(0, ends, NEVER)
        if self.failed:
            logits.index_fill_(0, upload([np.array(self.failed)], device)[0], float("nan"))

    def _penalties(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat indices of penalised tokens, their repetition penalties, and the amounts to subtract."""
        if not self.penalised:
            return np.empty(0, np.int64), _like(logits, np.empty(0)), _like(logits, np.empty(0))
        firsts, repetitions, seen = zip(*self.penalised, strict=True)
        ids = [one.ids for one in seen]
        lengths = np.array(list(map(len, ids)))
        places = np.repeat(np.array(firsts, dtype=np.int64), lengths)
        places += np.concatenate(ids)
        repetition = np.repeat(_like(logits, np.array(repetitions, dtype=np.float64)), lengths)
        return places, repetition, _like(logits, np.concatenate([one.minus for one in seen]))

    def _denied(self, device: torch.device) -> torch.Tensor:
        """The masks' zeros as booleans `[masked, vocab_size]`; tokens beyond a mask are denied."""
        bits = np.zeros((len(self.masks), -(-self.vocab_size // 8)), dtype=np.uint8)
        for row, mask in zip(bits, self.masks, strict=True):
            known = min(len(row), len(mask))
            row[:known] = mask[:known]
        packed, places = upload([bits.reshape(-1), 1 << np.arange(8, dtype=np.uint8)], device)
        return (packed.view(len(bits), -1, 1) & places).eq(0).view(len(bits), -1)[:, : self.vocab_size]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _like(logits: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
    """Convert numbers to the precision of the logits."""
    return numbers.astype(np.float64 if logits.dtype == torch.float64 else np.float32)


def probabilities(logits: torch.Tensor, sequences: Rows[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[rows, vocab_size]` in float64 to draw from, and uniform numbers `[rows, 1]` to draw with.

    Filters exclude tokens by setting their weights to zero. Each number comes from the sequence's own generator.
    """
    rules = np.concatenate([sequence.filters for sequence in sequences]).reshape(len(sequences), -1)
    draws = np.minimum([sequence.next_uniform() for sequence in sequences], LARGEST_UNIFORM)
    [temperature] = upload([_like(logits, rules[:, 0])], logits.device)
    scaled = _keep_top_k(logits / temperature[:, None], rules[:, 1])
    numbers = np.ascontiguousarray(rules[:, 2:].T)
    top_p, min_p, typical_p, draw = (n[:, None] for n in upload([*numbers, draws], logits.device))
    has_top_p, has_min_p, has_typical_p = (numbers[0] < math.inf).any(), numbers[1].any(), (numbers[2] < math.inf).any()
    kept = scaled.softmax(dim=-1, dtype=torch.float64)
    best: torch.Tensor | None = None
    if has_top_p:
        ordered, index = kept.sort(dim=-1, descending=True)
        kept, best = _drop_after(ordered, index, top_p), ordered[:, :1]
    if has_min_p:
        best = kept.amax(dim=-1, keepdim=True) if best is None else best
        kept = kept.masked_fill(kept < best * min_p, 0.0)
    if has_typical_p:
        kept = torch.where(typical_p < math.inf, _keep_typical(kept, typical_p), kept)
    return kept, draw


def _keep_top_k(scaled: torch.Tensor, top_k: np.ndarray) -> torch.Tensor:
    """Keep the `top_k` `[rows]` most likely tokens; 0 or the vocabulary's size means no limit."""
    limited = (top_k > 0) & (top_k < scaled.shape[1])
    if not limited.any():
        return scaled
    most = int(top_k[limited].max())
    values = scaled.topk(most, dim=-1).values
    if not limited.all():
        values = torch.nn.functional.pad(values, (0, 1), value=NEVER)  # the threshold of rows without a limit
    [kth] = upload([np.where(limited, top_k - 1, most).astype(np.int64)], scaled.device)
    return scaled.masked_fill_(scaled < values.gather(1, kth[:, None]), NEVER)


def _keep_typical(kept: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach `mass` (Meister et al. 2022)."""
    kept = kept / kept.sum(dim=-1, keepdim=True)
    surprise = -kept.log()
    entropy = (kept * surprise).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
    index = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    return _drop_after(kept.gather(1, index), index, mass)


def _drop_after(ordered: torch.Tensor, index: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Set the probabilities after the mass is reached, in this order, to zero, and restore the original order."""
    before = ordered.cumsum(dim=-1) - ordered
    return torch.empty_like(ordered).scatter_(1, index, ordered.masked_fill(before >= mass, 0.0))
