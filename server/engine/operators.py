"""The small work of a layer between its matrix products: norm, rotary embedding, gate.

As torch's operators, on any device and in any dtype; or as compiled loops (`kernels.py`), which on a CPU save the
microseconds that each of torch's operators costs, and the waking of its threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:  # numba is only imported where it is used
    from server.engine.kernels import Kernels

AS_NUMPY = {torch.bfloat16: torch.uint16, torch.float32: torch.float32}
"""What a compiled loop reads numbers as: numpy knows no bfloat16."""


class Operators:
    """What a fused layer needs beside products and attention, by torch.

    Attributes:
        rotary_dtype: what `cos` and `sin` are wanted in; None is the model's own.
    """

    rotary_dtype: torch.dtype | None = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Root mean square norm (Zhang and Sennrich 2019) over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int) -> torch.Tensor:
        """Rotary embedding (Su et al. 2021), halves paired as transformers pairs them; may write to `x`.

        Args:
            x: `[tokens, all_heads, dim]`.
            cos: `[tokens, dim]`.
            sin: `[tokens, dim]`, its first half negated.
            num_rotated: so many heads are turned, the others stay as they are.
        """
        heads = x[:, :num_rotated]
        swapped = torch.cat(heads.chunk(2, dim=-1)[::-1], dim=-1)
        rotated = torch.addcmul(heads * cos.unsqueeze(1), swapped, sin.unsqueeze(1))
        return torch.cat((rotated, x[:, num_rotated:]), dim=1)

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of `[tokens, 2 * width]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class CompiledOperators(Operators):
    """The same by compiled loops, for bfloat16 and float32 on a CPU."""

    rotary_dtype = torch.float32

    def __init__(self, kernels: Kernels) -> None:
        """Use these kernels."""
        self._kernels = kernels

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `Operators`."""
        rows = x.contiguous().view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        self._kernels.rms_norm(as_numpy(rows), as_numpy(weight), np.float32(epsilon), as_numpy(out))
        return out.view(x.shape)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int) -> torch.Tensor:
        """See `Operators`."""
        self._kernels.rotate(as_numpy(x), as_numpy(cos), as_numpy(sin), num_rotated)
        return x

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operators`."""
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._kernels.silu_gate(as_numpy(gate_up), as_numpy(out))
        return out


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory for a compiled loop."""
    array: np.ndarray = tensor.view(AS_NUMPY[tensor.dtype]).numpy()
    return array
