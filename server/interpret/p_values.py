"""P-values, the false discovery rate, and spreads of nulls."""

import torch

from server.interpret.results import Spread

DRAWS = 1000
"""Draws of a Monte Carlo null."""


def p_values(observed: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
    """One-sided Monte Carlo p-values `[n]` of observed values `[n]` under a null `[draws]` (Phipson and Smyth 2010).

    They are (1 + #{null ≥ observed}) / (1 + draws).
    """
    ordered = null.double().sort().values
    at_least = (len(ordered) - torch.searchsorted(ordered, observed.double().contiguous(), side="left")).double()
    return (1.0 + at_least) / (1.0 + len(ordered))


def normal_p(z: torch.Tensor) -> torch.Tensor:
    """One-sided p-values of standard normal scores."""
    return torch.erfc(z.double() / 2**0.5) / 2


def adjusted(p: torch.Tensor) -> torch.Tensor:
    """P-values `[n]` adjusted for the false discovery rate (Benjamini and Hochberg 1995)."""
    count = len(p)
    ordered, order = p.double().sort(descending=True)
    ranks = torch.arange(count, 0, -1, dtype=torch.float64, device=p.device)
    found = torch.empty_like(ordered)
    found[order] = (ordered * count / ranks).cummin(0).values.clamp(max=1.0)
    return found


def spread(null: torch.Tensor) -> Spread:
    """Mean, standard deviation and percentiles of a null `[draws]`; one draw alone deviates by 0."""
    values = null.double()
    low, high, top = torch.quantile(values, values.new_tensor([0.05, 0.95, 0.99])).tolist()
    sd = float(values.std()) if len(values) > 1 else 0.0
    return Spread(mean=float(values.mean()), sd=sd, low=low, high=high, top=top)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors `[…, d]` of length 1; a zero vector stays zero."""
    lengths: torch.Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)
