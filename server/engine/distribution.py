"""What rules make of logits: penalties, biases and filters, each for all rows at once.

Rows have rules of their own, but a device pays for each operator and each upload, not for rows. So the host lists what
every row's rules change, and uploads the lists of all rows together. The order is transformers': penalties, biases,
what must not come, temperature, top-k, top-p (Holtzman et al. 2020), min-p, typical-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import numpy as np
import torch

from server.core import SamplingParams
from server.engine.seen_tokens import SeenTokens
from server.engine.sequence import Sequence
from server.engine.upload import upload

NEVER = float("-inf")

LARGEST_UNIFORM = 1.0 - 2.0**-52
"""The largest number below 1 whose product with any total is less than that total, however it is rounded."""


def changes_logits(sequence: Sequence) -> bool:
    """Whether rules change a row before its best token is looked for."""
    return (
        sequence.seen is not None
        or bool(sequence.sampling.logit_bias)
        or sequence.walk is not None
        or len(sequence.output_ids) < sequence.sampling.min_new_tokens
    )


def apply_rules(
    logits: torch.Tensor, sequences: Rows[Sequence], ruled: Rows[int], eos_token_ids: frozenset[int]
) -> None:
    """Penalties, biases, and what may not come next; in place on `[rows, vocab_size]`, in the `ruled` rows.

    A sequence whose rules raise keeps the exception in `error`, and its row becomes NaN; no other row changes.
    """
    changes = _Changes(logits.shape[1])
    failed = []
    for row in ruled:
        try:
            changes.add(row, sequences[row], eos_token_ids)
        except Exception as exc:  # noqa: BLE001 - its request ends by it, and no other
            sequences[row].error = exc
            failed.append(row)
    changes.apply(logits)
    if failed:
        logits.index_fill_(0, upload([np.array(failed)], logits.device)[0], float("nan"))


@dataclass
class _Changes:
    """What rules change in logits `[rows, vocab_size]`. Places are counted through all rows."""

    vocab_size: int
    penalised: list[tuple[int, SamplingParams, SeenTokens]] = field(default_factory=list)
    """Each row's first place, its penalties, and the tokens that they are for."""
    biased: list[np.ndarray] = field(default_factory=list)
    """Places of each row's biases."""
    biases: list[np.ndarray] = field(default_factory=list)
    forbidden: list[int] = field(default_factory=list)
    """Places of tokens that may not come next."""
    masked: list[int] = field(default_factory=list)
    """Rows whose grammar says which tokens may come next."""
    masks: list[np.ndarray] = field(default_factory=list)

    def add(self, row: int, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
        """Take one row's rules, all or none of them.

        Raises:
            IndexError: a token id is none of the model's; its place would be in another row.
        """
        first, seen, params = row * self.vocab_size, sequence.seen, sequence.sampling
        if not (seen is None or seen.are_within(self.vocab_size)):
            raise self._unknown()
        if sequence.walk is not None or params.logit_bias or len(sequence.output_ids) < params.min_new_tokens:
            self._add_others(row, first, sequence, eos_token_ids)
        if seen is not None:
            self.penalised.append((first, params, seen))

    def _add_others(self, row: int, first: int, sequence: Sequence, eos_token_ids: frozenset[int]) -> None:
        ids, biases = sequence.bias
        mask = None if sequence.walk is None else sequence.walk.allowed_bits()
        ends: frozenset[int] = frozenset()
        # A grammar knows better than `min_new_tokens` when there may be an end.
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
        """Change the logits in place."""
        penalised, *penalties = self._penalties()
        biased, biases = _joined(self.biased, np.int64), _joined(self.biases, np.float64)
        forbidden, masked = (np.array(places, dtype=np.int64) for places in (self.forbidden, self.masked))
        flat, device = logits.view(-1), logits.device
        seen, moved, ends, rows = upload([penalised, biased, forbidden, masked], device)
        if len(seen) or len(moved):
            factor, minus, plus = upload([_like(logits, numbers) for numbers in (*penalties, biases)], device)
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

    def _penalties(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places of seen tokens, what their logits are multiplied with or divided by, and what is taken off them."""
        ids = [seen.ids for _, _, seen in self.penalised]
        rules = np.array(
            [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p, _ in self.penalised]
        ).reshape(-1, 3)
        lengths = [len(some) for some in ids]
        first = np.repeat(np.array([first for first, *_ in self.penalised], dtype=np.int64), lengths)
        repetition, presence, frequency = np.repeat(rules, lengths, axis=0).T
        counts = _joined([seen.counts for _, _, seen in self.penalised], np.float64)
        return first + _joined(ids, np.int64), repetition, presence * (counts > 0) + frequency * counts

    def _denied(self, device: torch.device) -> torch.Tensor:
        """The masks' zeros as booleans `[masked, vocab_size]`; what a mask does not know is denied."""
        bits = np.zeros((len(self.masks), -(-self.vocab_size // 8)), dtype=np.uint8)
        for row, mask in zip(bits, self.masks, strict=True):
            known = min(len(row), len(mask))
            row[:known] = mask[:known]
        packed, places = upload([bits.reshape(-1), 1 << np.arange(8, dtype=np.uint8)], device)
        return (packed.view(len(bits), -1, 1) & places).eq(0).view(len(bits), -1)[:, : self.vocab_size]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _like(logits: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
    """Numbers as precise as the logits that they are for."""
    return numbers.astype(np.float64 if logits.dtype == torch.float64 else np.float32)


def probabilities(logits: torch.Tensor, sequences: Rows[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row is drawn from, `[rows, vocab_size]` in float64, and a uniform number to draw with, `[rows, 1]`.

    A filter leaves tokens out by making them zero. The number comes from each sequence's own generator.
    """
    rules = np.array([sequence.filters for sequence in sequences])
    draws = np.array([min(sequence.next_uniform(), LARGEST_UNIFORM) for sequence in sequences])
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
    """Keep the most likely tokens, `[rows]`; a row without a limit has 0, or as many as there are."""
    limited = (top_k > 0) & (top_k < scaled.shape[1])
    if not limited.any():
        return scaled
    most = int(top_k[limited].max())
    values = scaled.topk(most, dim=-1).values
    if not limited.all():
        values = torch.nn.functional.pad(values, (0, 1), value=NEVER)  # what rows without a limit are compared with
    [kth] = upload([np.where(limited, top_k - 1, most).astype(np.int64)], scaled.device)
    return scaled.masked_fill_(scaled < values.gather(1, kth[:, None]), NEVER)


def _keep_typical(kept: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The tokens whose surprise is nearest to the entropy, until they reach `mass` (Meister et al. 2022)."""
    kept = kept / kept.sum(dim=-1, keepdim=True)
    surprise = -kept.log()
    entropy = (kept * surprise).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
    index = (surprise - entropy).abs().argsort(dim=-1, stable=True)
    return _drop_after(kept.gather(1, index), index, mass)


def _drop_after(ordered: torch.Tensor, index: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Zero the probabilities before which, in this order, the mass is reached, and put all of them back in place."""
    before = ordered.cumsum(dim=-1) - ordered
    return torch.empty_like(ordered).scatter_(1, index, ordered.masked_fill(before >= mass, 0.0))
