"""Necessity: leave one virtual token out. Some may harm (XPrompt, Ma et al. 2022)."""

from collections.abc import Mapping

import torch

from server.evaluation.intervals import Bootstrap, Statistic
from server.interpret.p_values import adjusted, spread
from server.interpret.results import LEVEL, Interval, Necessity, Removal


def necessity(
    bootstrap: Bootstrap, learned: Statistic, without: Mapping[int, Statistic], replaced_by: str
) -> Necessity:
    """The loss of quality by each removal, by the paired bootstrap.

    Qualities are larger if better; `without` has them by removed virtual token, which `replaced_by` took the place of.
    """
    losses = {index: bootstrap.difference(statistic, learned) for index, statistic in without.items()}
    p = [two_sided(bootstrap, learned, statistic) for statistic in without.values()]
    corrected = adjusted(torch.tensor(p, dtype=torch.float64)).tolist()
    found = tuple(
        Removal(
            token=index,
            loss=Interval(value=loss.value, low=loss.low, high=loss.high),
            p=value,
            effect="none shown" if value > LEVEL else "needed" if loss.value > 0 else "harmful",
        )
        for (index, loss), value in zip(losses.items(), corrected, strict=True)
    )
    return Necessity(
        replaced_by=replaced_by,
        tokens=found,
        null=spread(torch.tensor([loss.value for loss in losses.values()])),
        needed=tuple(one.token for one in found if one.effect == "needed"),
        harmful=tuple(one.token for one in found if one.effect == "harmful"),
    )


def two_sided(bootstrap: Bootstrap, learned: Statistic, other: Statistic) -> float:
    """P-value that two figures on the same rows are equal."""
    differences = bootstrap.figures(learned) - bootstrap.figures(other)
    tails = (1 + (differences <= 0).sum(), 1 + (differences >= 0).sum())
    return min(1.0, 2 * float(min(tails)) / (1 + len(differences)))
