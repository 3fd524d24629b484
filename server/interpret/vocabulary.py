"""The frozen model's vocabulary as vectors: centred cosines and nearest tokens.

Embeddings share a large common direction, so the raw cosine of two random tokens is far from 0 (0.44 in the embedded
model). All cosines here are taken after subtracting the mean embedding. Rows are embedded in pieces and not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from server.engine.model.frozen import FrozenModel
from server.interpret.p_values import unit

ROWS_AT_ONCE = 8192


class Neighbours(NamedTuple):
    """The k nearest rows of some vectors: positions in `Vocabulary.token_ids`, and centred cosines, both `[n, k]`."""

    rows: torch.Tensor
    cosines: torch.Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary and their embeddings.

    Attributes:
        token_ids: `[V]`, the ids that the tokenizer has; a padded vocabulary has rows for which there is no token.
        embed: embeddings `[n, d]` of token ids `[n]`.
        text_of: a token as text.
        mean: `[d]`, the mean embedding.
        norms: `[V]`, lengths of the embeddings, not centred.
    """

    token_ids: torch.Tensor
    embed: Callable[[torch.Tensor], torch.Tensor]
    text_of: Callable[[int], str]
    mean: torch.Tensor
    norms: torch.Tensor

    @classmethod
    def of(cls, model: FrozenModel) -> Vocabulary:
        """The vocabulary of a model."""
        backend = model.text.backend
        known = [i for i in range(model.spec.vocab_size) if backend.id_to_token(i) is not None]
        ids = torch.tensor(known, device=model.device)
        return cls.over(ids, lambda chosen: _wide(model.embed(chosen)), model.text.tokens.text_of)

    @classmethod
    @torch.no_grad()
    def over(
        cls, token_ids: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], text_of: Callable[[int], str]
    ) -> Vocabulary:
        """A vocabulary of given tokens; computes its mean and norms."""
        pieces = [embed(ids) for ids in torch.split(token_ids, ROWS_AT_ONCE)]
        mean = torch.stack([piece.sum(0) for piece in pieces]).sum(0) / len(token_ids)
        return cls(token_ids, embed, text_of, mean, torch.cat([piece.norm(dim=1) for piece in pieces]))

    def centred(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors of points `[n, d]`, seen from the mean embedding."""
        return unit(vectors - self.mean)

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Centred unit rows `[…, d]` at positions `[…]` in `token_ids`."""
        return self.centred(self.embed(self.token_ids[positions.flatten()])).view(*positions.shape, -1)

    @torch.no_grad()
    def nearest(self, directions: torch.Tensor, k: int, without: torch.Tensor | None = None) -> Neighbours:
        """The k nearest tokens of unit vectors `[n, d]` by centred cosine.

        Args:
            directions: `[n, d]`.
            k: at most the size of the vocabulary.
            without: `[n]`, for each direction a position that does not count, such as the row's own.
        """
        k = min(k, len(self.token_ids) - (without is not None))
        best: torch.Tensor | None = None
        places = torch.empty(0)
        for first in range(0, len(self.token_ids), ROWS_AT_ONCE):
            rows = self.centred(self.embed(self.token_ids[first : first + ROWS_AT_ONCE]))
            cosines = directions @ rows.T
            if without is not None:
                own = torch.arange(first, first + len(rows), device=rows.device)[None] == without[:, None]
                cosines = cosines.masked_fill(own, -torch.inf)
            found, at = cosines.topk(min(k, len(rows)), dim=1)
            at = at + first
            if best is not None:
                found, at = torch.cat([best, found], dim=1), torch.cat([places, at], dim=1)
                found, order = found.topk(min(k, found.shape[1]), dim=1)
                at = at.gather(1, order)
            best, places = found, at
        assert best is not None, "a vocabulary has tokens"
        return Neighbours(places, best)

    def coherence(self, neighbours: Neighbours) -> torch.Tensor:
        """`[n]`: the mean pairwise cosine of the k nearest tokens; 0 for k = 1."""
        k = neighbours.rows.shape[1]
        rows = self.rows(neighbours.rows)
        total = rows.sum(1).square().sum(-1) - rows.square().sum((1, 2))
        return total / max(1, k * (k - 1))

    @torch.no_grad()
    def covariance(self) -> torch.Tensor:
        """`[d, d]`, of the embeddings."""
        size = len(self.mean)
        total = torch.zeros(size, size, device=self.mean.device, dtype=torch.float64)
        for ids in torch.split(self.token_ids, ROWS_AT_ONCE):
            centred = self.embed(ids) - self.mean
            total += (centred.T @ centred).double()
        return total / len(self.token_ids)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
