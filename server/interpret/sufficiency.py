"""Sufficiency: how much of its effect a changed soft prompt keeps (Khashabi et al. 2022 on the discretisation gap)."""

from collections.abc import Mapping, Sequence

import numpy as np

from server.evaluation.intervals import PERCENTILES, Bootstrap, Statistic
from server.interpret.results import Interval, LadderStep, Sufficiency
from server.interpret.variants import NEAREST, RANDOM


def sufficiency(
    bootstrap: Bootstrap, learned: Statistic, none: Statistic, variants: Mapping[str, Statistic]
) -> Sufficiency:
    """R of each variant, with an interval over the same resamples of the rows.

    Qualities are larger if better; `none` is that of the frozen model in the same template without virtual tokens.
    """
    gain = bootstrap.difference(none, learned)
    steps = []
    for name, statistic in variants.items():
        ratio = _ratio(bootstrap, learned, none, statistic) if gain.low > 0 else None
        steps.append(LadderStep(name=name, quality=interval(bootstrap, statistic), ratio=ratio))
    return Sufficiency(
        learned=interval(bootstrap, learned),
        none=interval(bootstrap, none),
        steps=tuple(steps),
        words_explain=_words_explain(steps),
    )


def interval(bootstrap: Bootstrap, statistic: Statistic) -> Interval:
    """A figure with its interval."""
    found = bootstrap.estimate(statistic)
    return Interval(value=found.value, low=found.low, high=found.high)


def _ratio(bootstrap: Bootstrap, learned: Statistic, none: Statistic, variant: Statistic) -> Interval:
    best, least, figures = (bootstrap.figures(one) for one in (learned, none, variant))
    gains = np.where(best > least, best - least, np.nan)
    low, high = np.nanpercentile((figures - least) / gains, PERCENTILES)
    value = (variant.value - none.value) / (learned.value - none.value)
    return Interval(value=value, low=float(low), high=float(high))


def _words_explain(steps: Sequence[LadderStep]) -> bool | None:
    ratios = {step.name: step.ratio for step in steps}
    words, chance = ratios.get(NEAREST), ratios.get(RANDOM)
    return None if words is None or chance is None else words.low > max(0.0, chance.high)
