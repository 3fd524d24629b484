"""A map of the vocabulary in two dimensions: where virtual tokens began and where they are.

The axes are the two main components of the vocabulary. They show little of a space of hundreds of dimensions, so the
map says which share of the variance it shows. It is a picture and no test.
"""

import torch

from server.interpret.null_cache import NullCache
from server.interpret.results import VocabularyMap
from server.interpret.vocabulary import Vocabulary

SAMPLE = 500
"""Tokens of the vocabulary that the map shows."""
SEED = 0
DIGITS = 3

Point = tuple[float, float]


@torch.no_grad()
def vocabulary_map(
    vocabulary: Vocabulary, cache: NullCache, fingerprint: str, learned: torch.Tensor, start: torch.Tensor | None
) -> VocabularyMap:
    """Places of virtual tokens `[n, d]`, and of their start if it is known, among tokens of the vocabulary."""
    kept = cache.get(f"{fingerprint}-map", lambda: _main_components(vocabulary))
    axes = kept["axes"].to(vocabulary.mean)

    def places(vectors: torch.Tensor) -> tuple[Point, ...]:
        found = ((vectors.to(axes) - vocabulary.mean) @ axes).tolist()
        return tuple((round(x, DIGITS), round(y, DIGITS)) for x, y in found)

    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(vocabulary.token_ids), generator=generator)[:SAMPLE].to(vocabulary.token_ids.device)
    first, second = kept["shares"].tolist()
    return VocabularyMap(
        variance=(first, second),
        vocabulary=places(vocabulary.embed(vocabulary.token_ids[chosen])),
        start=() if start is None else places(start),
        learned=places(learned),
    )


def _main_components(vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """The two main directions `[d, 2]` of the vocabulary, and their shares of its variance."""
    covariance = vocabulary.covariance().double()
    values, vectors = torch.linalg.eigh(covariance)
    return {"axes": vectors[:, [-1, -2]], "shares": values[[-1, -2]] / values.sum()}
