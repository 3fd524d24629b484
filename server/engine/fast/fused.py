"""Decoder layers of the Llama family in a handful of operators.

transformers writes layers for readability: seven matrix products, and norms and rotary embeddings of many small
operators, each of which costs some microseconds regardless of its work. In this module, query, key and value are one
product, gate and up are another, and residuals are added while a product is written. Any layer with exactly these parts
can be replaced (Llama, Mistral, Qwen 2 and 3, SmolLM, …); a trial, not the layer's name, decides whether it is
(`optimise.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from server.engine.attention.interface import AttentionRules, Layout
from server.engine.fast.linear import FrozenLinear
from server.engine.fast.operators import Operators
from server.engine.fast.tiled import TiledLinear, frozen_linear

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.library import Kernels

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")
"""transformers' kinds of rotary embeddings whose angles depend on the position alone, not on the sequence's length."""

_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def has_known_parts(layer: nn.Module) -> bool:
    """Whether a layer consists of exactly the parts that `FusedLayer` computes."""
    parts = dict(layer.named_children())
    if parts.keys() != _LAYER:
        return False
    attention, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    norms += [attention[name] for name in sorted(_HEAD_NORMS & attention.keys())]
    linears = [attention[name] for name in _ATTENTION & attention.keys()]
    linears += [mlp[name] for name in _MLP - {"act_fn"} & mlp.keys()]
    return (
        attention.keys() in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and mlp.keys() == _MLP
        and all(type(linear) is nn.Linear for linear in linears)
        and all({name for name, _ in norm.named_parameters()} == {"weight"} for norm in norms)
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and not list(parts["self_attn"].parameters(recurse=False))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
    )


class FusedRotary(nn.Module):
    """A model's own rotary embedding in the form that `FusedLayer` needs; computed once per step."""

    def __init__(self, rotary: nn.Module, operators: Operators) -> None:
        super().__init__()
        self.rotary = rotary
        self._dtype, self._operators = operators.rotary_dtype, operators
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def tabulate(self, num_positions: int, dtype: torch.dtype) -> None:
        """Compute `cos` and `sin` of the first positions now, for a model of this dtype, if they will not change.

        All positions must then be below `num_positions`.
        """
        if getattr(self.rotary, "rope_type", None) in FIXED_ANGLES:
            self._tables = self._of(torch.zeros(1, dtype=dtype), torch.arange(num_positions)[None])

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`cos` and `sin` `[tokens, head_dim]`; the first half of `sin` is negated, as the rotation needs it."""
        if self._tables is None:
            return self._of(x, position_ids)
        cos, sin = self._tables
        return self._operators.rows(cos, position_ids[0]), self._operators.rows(sin, position_ids[0])

    def _of(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table[0].to(self._dtype or x.dtype) for table in self.rotary(x, position_ids=position_ids))
        first, second = sin.chunk(2, dim=-1)
        return cos.contiguous(), torch.cat((-first, second), dim=-1)


class FusedEmbedding(nn.Module):
    """The input embeddings, a drop-in replacement for torch's module."""

    def __init__(self, embedding: nn.Embedding, operators: Operators) -> None:
        """Share the weights of `embedding`."""
        super().__init__()
        self.weight, self._operators = embedding.weight, operators

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows `[…, hidden_size]` of token ids in any shape."""
        found = self._operators.rows(self.weight, token_ids.reshape(-1))
        return found.view(*token_ids.shape, -1)


class FusedNorm(nn.Module):
    """The norm after the last layer, a drop-in replacement for transformers'."""

    def __init__(self, norm: nn.Module, operators: Operators) -> None:
        super().__init__()
        self._norm, self._operators = Norm.of(norm), operators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, hidden_size]`, each row divided by its root mean square and weighted."""
        return self._operators.rms_norm(x, self._norm.weight, self._norm.epsilon)


class FusedLayer(nn.Module):
    """One decoder layer, a drop-in replacement in transformers' loop over layers."""

    def __init__(
        self, layer: nn.Module, index: int, rules: AttentionRules, head_dim: int, operators: Operators, *, pack: bool
    ) -> None:
        """Copy the weights of transformers' layer at this index, for which `has_known_parts` is true."""
        super().__init__()
        self.is_last = False  # whether it may return only the needed rows
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.index, self.rules, self.head_dim, self._operators = index, rules, head_dim, operators
        self.heads = attention.q_proj.out_features // head_dim
        self.kv_heads = attention.k_proj.out_features // head_dim
        self._activation = mlp.act_fn
        self.is_silu = isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
        join = partial(_joined, kernels=operators.kernels if pack else None, pack=pack)
        self.qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output_projection = join(attention.o_proj, adds=True)
        self.gate_up = join(mlp.gate_proj, mlp.up_proj, is_gated=self.is_silu)
        self.down = join(mlp.down_proj, adds=True)
        self.attention_norm = Norm.of(layer.input_layernorm)
        self.mlp_norm = Norm.of(layer.post_attention_layernorm)
        has_head_norms = hasattr(attention, "q_norm")
        self.head_norms = [Norm.of(attention.q_norm), Norm.of(attention.k_norm)] if has_head_norms else []

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        kept: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """`[1, tokens, hidden_size]` to the same shape; `position_embeddings` come from `FusedRotary`.

        The last layer returns only the rows in `kept` `[n]`, if given: most rows of a prefill are needed there only for
        their keys and values.
        """
        x = hidden_states[0]
        attended = self._attend(self._norm(x, self.attention_norm), position_embeddings, layout)
        if self.is_last and kept is not None and len(kept) < len(x):
            x, attended = x[kept], attended[kept]
        x = self.output_projection.added_to(x, attended)
        return self.down.added_to(x, self._gated(self._norm(x, self.mlp_norm))).unsqueeze(0)

    def products(self) -> tuple[nn.Module, ...]:
        """Its four matrix products."""
        return self.qkv, self.output_projection, self.gate_up, self.down

    def _attend(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], layout: Layout
    ) -> torch.Tensor:
        tokens, heads, kv_heads, dim = x.shape[0], self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(x).view(tokens, heads + 2 * kv_heads, dim)
        if self.head_norms:
            query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
            query, key = (self._norm(part, norm) for part, norm in zip((query, key), self.head_norms, strict=True))
            qkv = torch.cat((query, key, value), dim=1)
        qkv = self._operators.rotate(qkv, *position_embeddings, heads + kv_heads)
        query, key, value = torch.split(qkv.transpose(0, 1), [heads, kv_heads, kv_heads])
        return layout.attend(self.index, query, key, value, self.rules).reshape(tokens, heads * dim)

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self._operators.rms_norm(x, norm.weight, norm.epsilon)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.gate_up, TiledLinear) and self.is_silu:
            return self.gate_up.gated(x)
        if self.is_silu:
            return self._operators.silu_gate(self.gate_up(x))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        activated: torch.Tensor = self._activation(gate) * up
        return activated


@dataclass(frozen=True)
class Norm:
    """The parameters of an RMS norm."""

    weight: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """The parameters of a module of transformers."""
        return cls(norm.weight.detach(), float(norm.variance_epsilon))


def _joined(
    *linears: nn.Linear, kernels: Kernels | None, pack: bool, adds: bool = False, is_gated: bool = False
) -> FrozenLinear | TiledLinear:
    """One product that computes the results of several, side by side."""
    weights = [linear.weight for linear in linears]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # a copy would temporarily double the memory
    biases = [linear.bias for linear in linears]
    bias = None
    if any(bias is not None for bias in biases):
        zeros = [weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])
    return frozen_linear(weight, bias, kernels, pack=pack, adds=adds, is_gated=is_gated)
