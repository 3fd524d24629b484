"""Nearest tokens of virtual tokens, of their starts, and of what training added (Lester et al. 2021, section 7).

Every real token's neighbourhood is a tight cluster, and a learned virtual token often still lies nearest to the token
that it began as (labels that persist in Lester et al.; our own in docs/interpretation.md). Neighbours of the learned
value therefore say nothing about what was learned, and may belong to a text that says something else (Khashabi et al.
2022). Tested is the change, without its part along the start: only a change that is nearer to a token than
random directions are is called word-like.
"""

from dataclasses import dataclass

import torch

from server.interpret.null_cache import NullCache
from server.interpret.p_values import DRAWS, adjusted, p_values, spread, unit
from server.interpret.results import LEVEL, Nearest, NearestOfToken, Neighbour
from server.interpret.vocabulary import Neighbours, Vocabulary

SEED = 0
DRAWN_AT_ONCE = 250


@dataclass(frozen=True)
class NeighbourNull:
    """Nulls of one vocabulary and k, each `[draws]`.

    Attributes:
        random_cosine, random_coherence: of random directions: cosine to the nearest token; coherence of the k nearest.
        row_cosine, row_coherence: the same of random tokens, without the token itself.
    """

    random_cosine: torch.Tensor
    random_coherence: torch.Tensor
    row_cosine: torch.Tensor
    row_coherence: torch.Tensor


def neighbour_null(vocabulary: Vocabulary, k: int, cache: NullCache, fingerprint: str) -> NeighbourNull:
    """The nulls of nearest tokens; random directions are isotropic."""
    return NeighbourNull(**cache.get(f"{fingerprint}-nearest-{k}", lambda: _draw(vocabulary, k)))


def _draw(vocabulary: Vocabulary, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    size = vocabulary.mean.shape[0]
    directions = torch.randn(DRAWS, size, generator=generator).to(vocabulary.mean)
    positions = torch.randint(len(vocabulary.token_ids), (DRAWS,), generator=generator).to(vocabulary.token_ids.device)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NeighbourNull.__dataclass_fields__}
    pieces = (torch.split(drawn, DRAWN_AT_ONCE) for drawn in (positions, directions))
    for chosen, drawn in zip(*pieces, strict=True):
        for name, near in (
            ("random", vocabulary.nearest(unit(drawn), k)),
            ("row", vocabulary.nearest(vocabulary.rows(chosen), k, without=chosen)),
        ):
            found[f"{name}_cosine"].append(near.cosines[:, 0].cpu())
            found[f"{name}_coherence"].append(vocabulary.coherence(near).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def orthogonal_change(vocabulary: Vocabulary, learned: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Unit vectors `[n, d]` of p − p⁰ without its part along p⁰, which is seen from the mean embedding."""
    change, along = learned - start, vocabulary.centred(start)
    return unit(change - (change * along).sum(1, keepdim=True) * along)


@torch.no_grad()
def nearest_tokens(
    vocabulary: Vocabulary, null: NeighbourNull, learned: torch.Tensor, start: torch.Tensor | None, k: int
) -> Nearest:
    """Neighbours in three columns, with the test of the change.

    Args:
        learned: the virtual tokens' embeddings `[n, d]`.
        start: what they were before training, `[n, d]`; None if that is unknown, which leaves no test.
    """
    near = vocabulary.nearest(vocabulary.centred(learned), k)
    coherence = vocabulary.coherence(near).tolist()
    nulls = {name: spread(getattr(null, name)) for name in NeighbourNull.__dataclass_fields__}
    size = near.rows.shape[1]
    if start is None:
        tokens = [
            NearestOfToken(learned=found, coherence=value)
            for found, value in zip(_named(vocabulary, near), coherence, strict=True)
        ]
        return Nearest(tokens=tuple(tokens), neighbours=size, **nulls)
    before = vocabulary.nearest(vocabulary.centred(start), k)
    added = vocabulary.nearest(orthogonal_change(vocabulary, learned, start), k)
    added_coherence = vocabulary.coherence(added)
    p = p_values(added.cosines[:, 0].cpu(), null.random_cosine)
    p_coherence = p_values(added_coherence.cpu(), null.random_coherence)
    corrected = adjusted(p)
    rows = zip(
        _named(vocabulary, near),
        _named(vocabulary, before),
        _named(vocabulary, added),
        (near.rows[:, 0] == before.rows[:, 0]).tolist(),
        coherence,
        vocabulary.coherence(before).tolist(),
        added_coherence.tolist(),
        p.tolist(),
        p_coherence.tolist(),
        corrected.tolist(),
        (corrected <= LEVEL).tolist(),
        strict=True,
    )
    fields = list(NearestOfToken.model_fields)
    found = tuple(NearestOfToken(**dict(zip(fields, row, strict=True))) for row in rows)
    return Nearest(
        tokens=found,
        neighbours=size,
        **nulls,
        num_at_start=sum(token.is_nearest_to_start is True for token in found),
        num_word_like=sum(token.is_word_like is True for token in found),
        p_change=float(corrected.min()),
        p_change_coherence=_p_of_mean(added_coherence.cpu(), null.random_coherence),
    )


def _p_of_mean(observed: torch.Tensor, null: torch.Tensor) -> float:
    """P-value of a mean over virtual tokens, among means of as many draws."""
    generator = torch.Generator().manual_seed(SEED)
    means = null[torch.randint(len(null), (DRAWS, len(observed)), generator=generator)].mean(1)
    return float(p_values(observed.mean()[None], means))


def _named(vocabulary: Vocabulary, near: Neighbours) -> list[tuple[Neighbour, ...]]:
    ids = vocabulary.token_ids[near.rows].tolist()
    return [
        tuple(
            Neighbour(token_id=token, text=vocabulary.text_of(token), cosine=cosine)
            for token, cosine in zip(tokens, cosines, strict=True)
        )
        for tokens, cosines in zip(ids, near.cosines.tolist(), strict=True)
    ]
