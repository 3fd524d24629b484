"""The value-change lens: which tokens a soft prompt raises through the model's own output path, for both kinds.

A prefix adds its values to what attention returns (Petrov et al. 2024), and what a layer adds to the residual stream
can be read in the vocabulary (Dar et al. 2023). The change of the mean value of all virtual tokens passes the output
projection, the final norm's gain and the output embeddings. Only direct paths are seen, and attention is taken as even
over the virtual tokens. The start is subtracted: without that, tokens that are never answered look raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from server.interpret.p_values import adjusted, normal_p, p_values, spread
from server.interpret.readout import Readout
from server.interpret.results import LEVEL, LabelScore, LabelTest, Lens, LensLayer, LensToken

LABEL_DRAWS = 4999
SEED = 0
LIKE_FREQUENCY = (0.8, 1.25)
"""Token ids relative to a label's: in a BPE vocabulary, ids follow the order of merges and so frequency."""
FEWEST_ALIKE = 50
"""Controls of a label; with fewer of its shape, tokens of any shape are its controls."""


@dataclass(frozen=True)
class LabelTokens:
    """First tokens of a task's labels.

    Attributes:
        answered: in the form that is answered.
        other_form: in a form that is not answered, as a control.
        in_start: those of `answered` that are among the initial tokens.
        excluded: tokens that are never drawn as controls, such as special tokens.
    """

    answered: tuple[int, ...]
    other_form: tuple[int, ...] = ()
    in_start: tuple[int, ...] = ()
    excluded: frozenset[int] = field(default_factory=frozenset)


@torch.no_grad()
def value_change_lens(
    readout: Readout,
    variances: torch.Tensor,
    change: torch.Tensor,
    start: torch.Tensor,
    labels: LabelTokens | None,
    texts: Sequence[str],
    *,
    top: int = 5,
) -> Lens:
    """Tokens that a change raises, and the test of the labels.

    Args:
        variances: `[layers, V]`, see `Readout.variances`.
        change: mean value changes `[layers, kv_heads * head_dim]`.
        start: mean values of the start, of the same shape.
        texts: of the scored tokens, `[V]`.
    """
    count = len(change)
    first = 2 * count // 3
    written = readout.written(change)
    z = _standardised(readout.scores(written[first:].sum(0, keepdim=True)))[0]
    p = token_p_values(readout, variances[first:], change[first:], written[first:])
    rejected = adjusted(p) <= LEVEL
    order = p.argsort()[: min(top, int(rejected.sum()))].tolist()
    ids = readout.token_ids.tolist()
    tokens = [LensToken(token_id=ids[i], text=texts[i], z=float(z[i]), p=float(p[i])) for i in order]
    found = Lens(first_layer=first, num_layers=count, tokens=tuple(tokens), num_significant=int(rejected.sum()))
    if labels is None or not labels.answered:
        return found
    of_start = readout.scores(readout.written(start)[first:].sum(0, keepdim=True))
    layers = _standardised(readout.scores(written))
    everywhere = _standardised(readout.scores(written.sum(0, keepdim=True)))[0]
    fresh = tuple(token for token in labels.answered if token not in labels.in_start)
    tested = fresh or labels.answered
    never = labels.excluded | {*labels.answered, *labels.other_form}
    sets = MatchedSets(ids, tested, never, texts)
    other = MatchedSets(ids, labels.other_form, never, texts).test(z, texts) if labels.other_form else None
    return found.model_copy(
        update={
            "labels": sets.test(z, texts),
            "labels_in_start": len(labels.in_start),
            "control_form": other,
            "control_start": sets.test(_standardised(of_start)[0], texts),
            "all_layers": sets.test(everywhere, texts),
            "curve": tuple(sets.layer(index, row) for index, row in enumerate(layers)),
        }
    )


def token_p_values(
    readout: Readout, variances: torch.Tensor, change: torch.Tensor, written: torch.Tensor
) -> torch.Tensor:
    """P-values `[V]` of tokens under Gaussian changes of the same norm in each layer.

    Under this null, a token's score is a sum of Gaussians whose variance is known, so no draws are needed; a thousand
    could not reach the level of a false discovery rate over the whole vocabulary. Scores in units of their own standard
    deviation are standardised over the vocabulary again, because a learned change is not isotropic.
    """
    lengths = change.square().sum(1) / change.shape[1]
    deviation = (lengths[:, None].to(variances) * variances).sum(0).sqrt()
    own = readout.scores(written.sum(0, keepdim=True)) / deviation.clamp_min(torch.finfo(torch.float32).tiny)
    return normal_p(_standardised(own)[0])


class MatchedSets:
    """Random sets of tokens, each as frequent as the tokens that are tested, and of their shape.

    What a task answers in is raised as a whole, such as words of small letters without a space before them. Against
    tokens of any shape, the labels of other tasks seem to be raised too.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        tested: Sequence[int],
        excluded: frozenset[int],
        texts: Sequence[str] | None = None,
    ) -> None:
        """Draw `LABEL_DRAWS` sets of positions in `token_ids`, which ascend; without texts, tokens have any shape."""
        place = {token: position for position, token in enumerate(token_ids)}
        self._ids = [token for token in tested if token in place]
        self._tested = torch.tensor([place[token] for token in self._ids], dtype=torch.long)
        free = [position for position, token in enumerate(token_ids) if token not in excluded]
        shapes = [shape_of(text) for text in texts] if texts is not None else [""] * len(token_ids)
        alike = {
            shape: torch.tensor([position for position in free if shapes[position] == shape], dtype=torch.long)
            for shape in {shapes[place[token]] for token in self._ids}
        }
        ids, generator = torch.tensor(token_ids), torch.Generator().manual_seed(SEED)
        drawn = []
        for token in self._ids:
            same = alike[shapes[place[token]]]
            found = _like(ids, token, same if len(same) >= FEWEST_ALIKE else torch.tensor(free))
            drawn.append(found[torch.randint(len(found), (LABEL_DRAWS,), generator=generator)])
        self._drawn = torch.stack(drawn, dim=1)

    def null(self, z: torch.Tensor) -> torch.Tensor:
        """Mean scores of the random sets, `[LABEL_DRAWS]`, from scores `[V]`."""
        return z.cpu()[self._drawn].mean(1)

    def test(self, z: torch.Tensor, texts: Sequence[str]) -> LabelTest:
        """Compare the mean score of the tested tokens with those of the random sets."""
        scores = z.cpu()[self._tested]
        null = self.null(z)
        tokens = [
            LabelScore(token_id=token, text=texts[position], z=float(score))
            for token, position, score in zip(self._ids, self._tested.tolist(), scores, strict=True)
        ]
        mean = scores.mean()
        return LabelTest(tokens=tuple(tokens), z=float(mean), null=spread(null), p=float(p_values(mean[None], null)))

    def layer(self, index: int, z: torch.Tensor) -> LensLayer:
        """The mean score through one layer, and the band of the random sets."""
        null = spread(self.null(z))
        return LensLayer(layer=index, z=float(z.cpu()[self._tested].mean()), low=null.low, high=null.high)


def shape_of(text: str) -> str:
    """The shape of a token: whether a space comes first, and which letters follow."""
    word = text.removeprefix(" ")
    letters = "mixed" if word.isalpha() else "other"
    if word.isalpha():
        kinds = {"small": word.islower(), "capitals": word.isupper(), "capitalised": word.istitle()}
        letters = next((name for name, holds in kinds.items() if holds), letters)
    return f"{'space, ' if word != text else ''}{letters}"


def _like(ids: torch.Tensor, token: int, positions: torch.Tensor) -> torch.Tensor:
    """Those positions whose tokens are about as frequent as a token: `FEWEST_ALIKE`, or all within `LIKE_FREQUENCY`."""
    known = ids[positions]
    factors = (LIKE_FREQUENCY[0], 1.0, LIKE_FREQUENCY[1])
    low, middle, high = (int(torch.searchsorted(known, int(token * factor))) for factor in factors)
    least = min(FEWEST_ALIKE, len(known))
    begin = min(max(0, middle - least // 2), len(known) - least)
    return positions[min(low, begin) : max(high, begin + least)]


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores `[n, V]` in standard deviations over the vocabulary."""
    spread_of = scores.std(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (scores - scores.mean(dim=1, keepdim=True)) / spread_of
