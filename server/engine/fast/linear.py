"""A matrix product with frozen weights, packed once in the layout that the CPU's library prefers.

oneDNN multiplies by weights in blocks that suit the processor's vector units. Given a plain matrix it rearranges it, or
reads it badly, at every call; a frozen model can have that done once. What is packed gives no gradient, so training
uses the model as transformers loaded it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKED_FOR = 64
"""Rows that the blocks are chosen for; any number can be multiplied."""


class FrozenLinear(nn.Module):
    """`x @ weight.T + bias`, without gradients.

    Attributes:
        is_packed: whether the weights are laid out for the CPU.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool) -> None:
        """Take weights `[out_features, in_features]`; packed, they are copied and can be forgotten."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = pack
        self._bias = None if bias is None else bias.detach()
        self._weight = weight.detach()
        if pack:  # a torch without oneDNN has none of these
            self._weight = _mkldnn("_reorder_linear_weight")(self._weight.contiguous(), PACKED_FOR)
            self._multiply = _mkldnn("_linear_pointwise")
            self._multiply_and_add = self._multiply.binary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, in_features]` to `[…, out_features]`."""
        if self.is_packed:
            out: torch.Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
            return out
        return F.linear(x, self._weight, self._bias)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual` plus the product, in one pass over the result where it is packed."""
        if self.is_packed:
            out: torch.Tensor = self._multiply_and_add(x, residual, self._weight, self._bias, "add")
            return out
        return residual + F.linear(x, self._weight, self._bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs such weights here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_mkldnn("_is_mkldnn_bf16_supported")())
    return weight.dtype == torch.float32


def _mkldnn(name: str) -> Any:
    """One of torch's operators for oneDNN: what torch.compile generates on a CPU, though their names are private."""
    return getattr(torch.ops.mkldnn, name)
