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
from tqdm import tqdm

from server.engine.fast.row_buckets import buckets

PACKED_FOR = 64
"""The number of rows for which the block layout is optimised; any number can be multiplied."""


class FrozenLinear(nn.Module):
    """`x @ weight.T + bias`, without gradients."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool, adds: bool = False
    ) -> None:
        """Take weights `[out_features, in_features]`; packing copies them, so the originals can be freed.

        `adds` says that `added_to` will be called instead of `forward`.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = pack
        self._adds = adds
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

    @property
    def code(self) -> tuple[object, ...]:
        """Layers for which this is equal share oneDNN's code for each number of rows."""
        return self.in_features, self.out_features, self._weight.dtype, self._bias is None, self._adds

    def prepare(self, rows: int) -> None:
        """Let oneDNN generate its code for this number of rows."""
        x = self._weight.new_zeros(rows, self.in_features, layout=torch.strided)
        if self._adds:
            self.added_to(x.new_zeros(rows, self.out_features), x)
        else:
            self(x)


@torch.inference_mode()
def prepare_products(module: nn.Module, most_rows: int, most_logits: int) -> None:
    """Let oneDNN generate its code for all numbers of rows that steps will have, so that no request waits for it.

    Args:
        module: the model.
        most_rows: of a step.
        most_logits: rows of logits of an ordinary step; a product that large for each row of a step would take seconds.
    """
    linears = {part.code: part for part in module.modules() if isinstance(part, FrozenLinear) and part.is_packed}
    widest = max((linear.out_features for linear in linears.values()), default=0)
    for rows in tqdm(buckets(most_rows) if linears else [], "preparing products", leave=False, delay=1.0, disable=None):
        for linear in linears.values():
            if rows <= most_logits or linear.out_features < widest:
                linear.prepare(rows)


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
