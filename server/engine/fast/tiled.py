"""A matrix product of bfloat16 by AMX, with frozen weights in tiles (`kernels/products.py`).

oneDNN uses AMX as well, but waits for all threads after each product and fetches no weights early. This product is
faster when few rows are multiplied, as in decoding, and gives a row the same result whatever other rows are beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from server.engine.fast.linear import FrozenLinear
from server.engine.kernels.units import BIAS, CHUNK, COLUMNS, GATE, RESIDUAL, SHARES, TILE_COLUMNS, ProductArguments

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.library import Kernels
    from server.engine.kernels.threads import Loop


def can_tile(weight: torch.Tensor, kernels: Kernels) -> bool:
    """Whether a product by these weights can be a `TiledLinear`."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    out_features, in_features = weight.shape
    return not (out_features % COLUMNS or in_features % TILE_COLUMNS) and kernels.has_tiles


class TiledLinear(nn.Module):
    """`x @ weight.T + bias` in bfloat16, without gradients."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels, *, is_gated: bool = False
    ) -> None:
        """Copy weights `[out_features, in_features]`, for which `can_tile` is true.

        `is_gated` says that they are those of a gate and, below, those of what it lets through.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_gated = is_gated
        self._kernels, self._thread = kernels, kernels.thread_number
        if is_gated:
            weight = _interleaved(weight)
            bias = None if bias is None else _interleaved(bias)
        self.weight = tile_weight(weight.detach())
        self.bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, in_features]` to `[…, out_features]`."""
        assert not self.is_gated, "see `gated`"
        return self._multiply(x, None, self.out_features)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual` plus the product, rounded once."""
        return self._multiply(x, residual.contiguous(), self.out_features)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of both halves of the product, rounded once; `[…, out_features / 2]`."""
        return self._multiply(x, None, self.out_features // 2)

    def loop(self, *, adds: bool) -> Loop:
        """The loop of its products, with a residual or without."""
        return self._kernels.product(BIAS * (self.bias is not None) + RESIDUAL * adds + GATE * self.is_gated)

    def arguments(
        self,
        rows: int,
        x: int,
        residual: torch.Tensor | None,
        out: int,
        *,
        x_in_tiles: bool = False,
        out_in_tiles: bool = False,
    ) -> ProductArguments:
        """The arguments of the loop, except for its counters, as `ProductArguments` describes them."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        added = 0 if residual is None else residual.data_ptr()
        sizes = rows, self.in_features, self.out_features
        shares = min(torch.get_num_threads(), SHARES)
        addresses = x, self.weight.data_ptr(), bias, added, out
        return ProductArguments(*sizes, *addresses, shares, self._thread, x_in_tiles, out_in_tiles)

    def _multiply(self, x: torch.Tensor, residual: torch.Tensor | None, width: int) -> torch.Tensor:
        assert x.dtype == torch.bfloat16 and x.shape[-1] == self.in_features, "as the weights are"  # noqa: PT018
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], width)
        rows = x.numel() // self.in_features
        loop = self.loop(adds=residual is not None)
        units, threads = self.out_features // COLUMNS * -(-rows // CHUNK), torch.get_num_threads()
        loop(units, threads, *self.arguments(rows, x.data_ptr(), residual, out.data_ptr()), *[0] * SHARES)
        return out


def frozen_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: Kernels | None,
    *,
    pack: bool = True,
    adds: bool = False,
    is_gated: bool = False,
) -> FrozenLinear | TiledLinear:
    """The fastest product by these weights; see the classes for the arguments."""
    if kernels is not None and can_tile(weight, kernels):
        return TiledLinear(weight, bias, kernels, is_gated=is_gated)
    return FrozenLinear(weight, bias, pack=pack, adds=adds)


def tile_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights `[out_features, in_features]` as tiles `[out / 32, in / 32, 2, 16, 16, 2]`.

    A tile has a row for each pair of inputs, and in it a pair of numbers for each of 16 outputs.
    """
    out_features, in_features = weight.shape
    parts = weight.view(out_features // COLUMNS, 2, 16, in_features // TILE_COLUMNS, 16, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def _interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rows of both halves in turn, 16 of each."""
    parts = weight.view(2, -1, COLUMNS // 2, *weight.shape[1:])
    return parts.transpose(0, 1).reshape(weight.shape)
