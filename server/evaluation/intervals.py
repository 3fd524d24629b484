"""Confidence intervals by the bootstrap: rows are drawn with replacement, and the figure is computed again.

Every metric is a function of sums over rows (even BLEU and macro-F1, which are not means), so a thousand resamples are
one matrix product. The same draws serve every figure, so of two systems on the same rows the difference can be
resampled too: this is the paired bootstrap, in which variation that both systems share cancels out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
SEED = 0
PERCENTILES = (2.5, 97.5)
DRAWN_AT_ONCE = 2**22
"""Number of drawn rows that are counted at once; limits memory."""


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that 95 % of the resamples lie in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Statistic:
    """A figure of one system, as sums over rows.

    Attributes:
        rows: `[rows, sums]`, what each row adds.
        figure: from sums `[…, sums]` to figures `[…]`.
    """

    rows: Floats
    figure: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The figure on all rows."""
        return float(self.figure(self.rows.sum(axis=0)))


class Bootstrap:
    """Resamples of a number of rows, the same ones for every statistic."""

    def __init__(self, num_rows: int, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        """Draw them: `[resamples, rows]`, how often each row is in each."""
        rng = np.random.default_rng(seed)
        at_once = max(1, DRAWN_AT_ONCE // num_rows)
        counts = [
            _count(rng.integers(0, num_rows, (min(at_once, resamples - begin), num_rows)))
            for begin in range(0, resamples, at_once)
        ]
        self._counts = np.concatenate(counts)

    def estimate(self, statistic: Statistic) -> Estimate:
        """A figure with its interval."""
        return _estimate(statistic.value, self.figures(statistic))

    def difference(self, one: Statistic, other: Statistic) -> Estimate:
        """By how much the second figure is larger than the first on the same rows, with its interval."""
        return _estimate(other.value - one.value, self.figures(other) - self.figures(one))

    def figures(self, statistic: Statistic) -> Floats:
        """The figure on each resample, `[resamples]`."""
        return statistic.figure(self._counts @ statistic.rows)


def _count(drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """How often each row was drawn, of `[resamples, rows]` draws."""
    resamples, num_rows = drawn.shape
    flat = (drawn + np.arange(resamples)[:, None] * num_rows).ravel()
    return np.bincount(flat, minlength=drawn.size).reshape(drawn.shape).astype(np.float32)


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.percentile(resampled, PERCENTILES)
    return Estimate(value, float(low), float(high))
