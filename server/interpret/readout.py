"""The direct path from an attention layer's values to the logits: output projection, final norm, output embeddings.

Every linear part is called as a function and not read as a matrix, so that packed, transposed and quantised weights
need no cases of their own. The gain of a norm is measured on a vector that the norm leaves as it is.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from server.engine.model.frozen import FrozenModel

Map = Callable[[torch.Tensor], torch.Tensor]

PROJECTIONS = (
    "output_projection",  # a fused layer of this server
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "self_attn.o_proj.linear",
    "self_attention.dense",
    "attention.dense",
    "attention.o_proj",
    "attn.c_proj",
    "attn.o_proj",
    "attn.out_proj",
)
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "embedding_norm", "norm_f")
BASIS_ROWS = 128


@dataclass(frozen=True)
class Readout:
    """The direct path of a model.

    Attributes:
        projections: of each attention layer, from `[n, heads * head_dim]` to `[n, d]`.
        kv_heads: heads of keys and values.
        repeats: heads of queries for each head of keys and values.
        head_dim: size of a head.
        gain: `[d]`, the final norm's.
        head: from `[n, d]` to logits `[n, vocab_size]`.
        token_ids: `[V]`, the tokens that are scored.
        dtype: of the weights.
    """

    projections: tuple[Map, ...]
    kv_heads: int
    repeats: int
    head_dim: int
    gain: torch.Tensor
    head: Map
    token_ids: torch.Tensor
    dtype: torch.dtype

    def written(self, values: torch.Tensor) -> torch.Tensor:
        """What mean values `[layers, kv_heads * head_dim]` add to the residual stream, `[layers, d]`."""
        return torch.cat([self.through(layer, value[None]) for layer, value in enumerate(values)])

    def through(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """What values `[n, kv_heads * head_dim]` of one layer add, `[n, d]`, if all heads attend to them alike."""
        heads = values.to(self.gain.device).view(len(values), -1, self.head_dim)
        return _scaled(self.projections[layer], heads.repeat_interleave(self.repeats, dim=1).flatten(1), self.dtype)

    def scores(self, written: torch.Tensor) -> torch.Tensor:
        """Logits `[n, V]` of additions `[n, d]` to the residual stream, centred over the vocabulary."""
        logits: torch.Tensor = _scaled(self.head, written * self.gain.to(written), self.dtype)[:, self.token_ids]
        return logits - logits.mean(1, keepdim=True)

    @torch.no_grad()
    def variances(self) -> torch.Tensor:
        """`[layers, V]`: variance of each token's score under a standard Gaussian change of the values of one layer."""
        width = self.kv_heads * self.head_dim
        found = []
        for layer in range(len(self.projections)):
            total = torch.zeros(len(self.token_ids), device=self.gain.device)
            for rows in torch.split(torch.eye(width, device=self.gain.device), BASIS_ROWS):
                total += self.scores(self.through(layer, rows)).float().square().sum(0)
            found.append(total)
        return torch.stack(found)


@torch.no_grad()
def find_readout(model: FrozenModel, token_ids: torch.Tensor) -> Readout | str:
    """The direct path of a model, or a sentence that says what could not be found."""
    spec, head = model.spec, model.module.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = _layers(model.module, spec.num_hidden_layers)
    if found is None or not isinstance(head, nn.Module):
        return f"The layers of {spec.name} were not recognised, so there is no lens."
    parents, layers = found
    norms = (getattr(parent, name, None) for parent in parents for name in NORMS)
    norm = next((child for child in norms if isinstance(child, nn.Module)), None)
    projections = [part for layer in layers if (part := _projection(layer)) is not None]
    if norm is None or len(projections) != spec.num_kv_layers:
        return f"The output projections or the final norm of {spec.name} were not found, so there is no lens."
    heads = spec.num_attention_heads or spec.num_key_value_heads
    readout = Readout(
        projections=tuple(projections),
        kv_heads=spec.num_key_value_heads,
        repeats=heads // spec.num_key_value_heads,
        head_dim=spec.head_dim,
        gain=gain_of(norm, spec.hidden_size, model),
        head=head,
        token_ids=token_ids,
        dtype=model.dtype,
    )
    try:
        width = spec.num_key_value_heads * spec.head_dim
        for layer in range(len(projections)):
            readout.scores(readout.through(layer, torch.zeros(1, width, device=model.device)))
    except RuntimeError:
        return f"The attention of {spec.name} is not laid out by heads, so there is no lens."
    return readout


def gain_of(norm: nn.Module, size: int, model: FrozenModel) -> torch.Tensor:
    """The gain `[d]` by which an RMS or layer norm multiplies, whatever its form (Gemma's is 1 + weight)."""
    signs = torch.ones(size, device=model.device)
    signs[1::2] = -1  # its mean is 0 and its mean square 1, so that either norm only multiplies it
    above, below = (norm((sign * signs).to(model.dtype)[None])[0].float() for sign in (1, -1))
    gain: torch.Tensor = (above - below) / 2 * signs
    return gain


def _layers(module: nn.Module, count: int) -> tuple[list[nn.Module], nn.ModuleList] | None:
    """The list of decoder layers, and the modules that hold it, innermost first.

    The module that holds the list need not have the final norm: one call may run all layers (`fast/chained.py`).
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            path = name.split(".")[:-1]
            return [module.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)], child
    return None


def _projection(layer: nn.Module) -> Map | None:
    """A layer's attention output projection, with the norm that a few models put after it."""
    modules = dict(layer.named_modules())
    found: Map | None = next((modules[name] for name in PROJECTIONS if name in modules), None)
    after = modules.get("post_attention_layernorm") if "post_feedforward_layernorm" in modules else None
    if found is None or after is None:
        return found
    return functools.partial(_gained, found, after)


def _gained(projection: Map, norm: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The projection times the gain of the norm after it; its division is one scale per layer."""
    out = projection(values)
    signs = torch.ones_like(out[:1])
    signs[:, 1::2] = -1
    gained: torch.Tensor = out * norm(signs) * signs
    return gained


def _scaled(function: Map, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A linear function of rows, without its bias, at a scale that suits the dtype of its weights."""
    size: torch.Tensor = values.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    out = function((values / size).to(dtype)) - function(torch.zeros_like(values[:1]).to(dtype))
    wide: torch.Tensor = out if out.dtype == torch.float64 else out.float()
    return wide * size
