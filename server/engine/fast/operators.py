"""The small operations between a layer's matrix products: norm, rotary embedding, gate.

They are implemented with torch's operators, for any device and dtype, and as compiled loops (`kernels/`), which on a
CPU avoid the overhead of torch's operators and of waking their threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from server.engine.kernels.units import ROWS, float_bits

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.library import Kernels
    from server.engine.kernels.small import SmallLoops
    from server.engine.kernels.threads import Loop

COMPILED_DTYPES = (torch.bfloat16, torch.float32)

NUMBERS_FOR_THREADS = 65536
"""With fewer numbers, one thread finishes in microseconds, before a second one has started."""


class Operators:
    """The operations that a fused layer needs beside products and attention, in torch."""

    rotary_dtype: torch.dtype | None = None
    """The dtype of `cos` and `sin`; None means the model's own."""

    kernels: Kernels | None = None
    """The compiled loops, if they are used."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Root mean square norm (Zhang and Sennrich 2019) over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int) -> torch.Tensor:
        """Rotary embedding (Su et al. 2021), halves paired as transformers pairs them; may write to `x`.

        Args:
            x: `[tokens, all_heads, dim]`.
            cos: `[tokens, dim]`.
            sin: `[tokens, dim]`, its first half negated.
            num_rotated: number of heads to rotate, the first ones; the others stay as they are.
        """
        heads = x[:, :num_rotated]
        swapped = torch.cat(heads.chunk(2, dim=-1)[::-1], dim=-1)
        rotated = torch.addcmul(heads * cos.unsqueeze(1), swapped, sin.unsqueeze(1))
        return torch.cat((rotated, x[:, num_rotated:]), dim=1)

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[tokens, 2 * width]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rows(self, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Rows `[n, width]` of a table `[rows, width]`, at indices `[n]`; raises IndexError for one beyond it."""
        return table[indices]

    def best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest number of each row `[rows, width]` and its first index; NaN if the row contains one."""
        largest, where = at_least_float32(logits).max(dim=-1)
        return largest, where

    def log_totals(self, logits: torch.Tensor) -> torch.Tensor:
        """The logarithm `[rows]` of each row's sum of exponentials, the same whatever other rows there are.

        torch divides the sum of a single row between its threads, so it adds up in another order than beside others.
        """
        logits = at_least_float32(logits)
        return logits.expand(2, -1).logsumexp(dim=-1)[:1] if len(logits) == 1 else logits.logsumexp(dim=-1)


class CompiledOperators(Operators):
    """The same operations as compiled loops, for bfloat16 and float32 on a CPU."""

    rotary_dtype = torch.float32

    def __init__(self, kernels: Kernels) -> None:
        self.kernels: Kernels = kernels

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        tokens = x.numel() // width
        addresses = (_address(x, x.dtype), _address(weight, x.dtype), _address(out, x.dtype))
        _run(self._loops(x).rms_norm, tokens, width, *addresses, width, float_bits(epsilon), 0)
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int) -> torch.Tensor:
        tokens, heads, dim = x.shape
        addresses = (_address(x, x.dtype), _address(cos, torch.float32), _address(sin, torch.float32))
        _run(self._loops(x).rotate, tokens, num_rotated * dim, *addresses, heads, num_rotated, dim)
        return x

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        addresses = (_address(gate_up, gate_up.dtype), _address(out, gate_up.dtype))
        _run(self._loops(gate_up).silu_gate, tokens, width, *addresses, width)
        return out

    def rows(self, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        found = indices.numpy()
        if len(found) and not 0 <= found.min() <= found.max() < len(table):
            raise IndexError(f"index out of range: {found.min()} to {found.max()} in a table of {len(table)} rows")
        out = table.new_empty(len(indices), table.shape[1])
        addresses = (_address(indices, torch.long), _address(table, table.dtype), _address(out, table.dtype))
        _run(self._loops(table).gather, len(indices), table.shape[1], *addresses, table.shape[1])
        return out

    def best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dtype not in COMPILED_DTYPES:
            return super().best(logits)
        return _of_rows(self._loops(logits).best, logits, torch.long)

    def log_totals(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.dtype not in COMPILED_DTYPES:
            return super().log_totals(logits)
        largest, totals = _of_rows(self._loops(logits).totals, logits, torch.float64)
        return totals.log_().add_(largest).float()

    def _loops(self, x: torch.Tensor) -> SmallLoops:
        return self.kernels.small(x.dtype)


def operators_with(kernels: Kernels | None) -> Operators:
    """The fastest available operators."""
    return Operators() if kernels is None else CompiledOperators(kernels)


def _address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """The address of a tensor, for a loop that cannot check dtype or layout itself."""
    assert tensor.dtype == dtype, f"{dtype} is read, {tensor.dtype} is stored"
    assert tensor.is_contiguous(), "read without gaps"
    return tensor.data_ptr()


def _of_rows(loop: Loop, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What a loop finds of each row of logits: the largest number, and another one of this dtype."""
    logits = logits.contiguous()
    rows, width = logits.shape
    largest = torch.empty(rows, dtype=torch.float32, device="cpu")
    other = torch.empty(rows, dtype=dtype, device="cpu")
    addresses = (_address(logits, logits.dtype), _address(largest, torch.float32), _address(other, dtype))
    loop(rows, torch.get_num_threads(), *addresses, width)
    return largest, other


def _run(loop: Loop, tokens: int, width: int, *arguments: int) -> None:
    """Run a loop over rows, in each of which it reads `width` numbers."""
    units = -(-tokens // ROWS)
    if tokens * width > NUMBERS_FOR_THREADS:
        loop(units, torch.get_num_threads(), tokens, *arguments)
    else:
        loop.briefly(units, tokens, *arguments)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32, except tensors in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
