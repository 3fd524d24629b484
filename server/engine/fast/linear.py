"""A matrix product whose frozen weights are packed once into the layout that oneDNN prefers on the CPU.

oneDNN multiplies by weights in blocks that suit the processor's vector units. It rearranges a plain matrix, or reads it
inefficiently, at every call; frozen weights can be rearranged once. Packed weights give no gradients, so training uses
the model as transformers loaded it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKED_FOR = 64
"""The number of rows for which the block layout is optimised; any number can be multiplied."""


class FrozenLinear(nn.Module):
    """`x @ weight.T + bias`, without gradients."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool) -> None:
        """Take weights `[out_features, in_features]`; packing copies them, so the originals can be freed."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = pack
        self._bias = None if bias is None else bias.detach()
        self._weight = weight.detach()
        if pack:  # these operators exist only in a torch with oneDNN
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
        """`residual` plus the product; with packed weights, in one pass over the result."""
        if self.is_packed:
            out: torch.Tensor = self._multiply_and_add(x, residual, self._weight, self._bias, "add")
            return out
        return residual + F.linear(x, self._weight, self._bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can pack these weights on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_mkldnn("_is_mkldnn_bf16_supported")())
    return weight.dtype == torch.float32


def _mkldnn(name: str) -> Any:
    """One of torch's oneDNN operators. Their names are private, but code that torch.compile generates calls them."""
    return getattr(torch.ops.mkldnn, name)
