"""Making a loaded model faster without changing what it computes: one pass over it, before it serves.

Nothing that the engine does depends on this pass, and each part of it can be switched off (`PRELUDE_OPTIMISE`):

    fused      decoder layers of the Llama family in a handful of operators          fused.py
    packed     weights of matrix products laid out for the CPU's library, once       linear.py
    compiled   norms, rotary embeddings and gates of fused layers, and the           kernels.py, operators.py,
               attention of decoding sequences, by machine code made at the start    decode_attention.py

A layer is replaced only if its replacement gives the same on a few tokens; otherwise the model runs as transformers
wrote it. What is optimised gives no gradients: training takes the model as it was loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from server.engine.attention import PackedRows
from server.engine.fused import FusedLayer, FusedRotary, has_known_parts
from server.engine.linear import FrozenLinear, can_pack
from server.engine.model import FrozenModel
from server.engine.operators import AS_NUMPY, CompiledOperators, Operators

if TYPE_CHECKING:
    from server.engine.kernels import Kernels

log = logging.getLogger(__name__)

PROBE_ROWS = (3, 5)
"""Tokens of the rows that a layer and its replacement are compared on."""

LARGEST_DIFFERENCE = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of what a layer adds to its input, relative and root mean square: beyond what rounding explains in that dtype."""
LARGEST_DIFFERENCE_OTHERWISE = 1e-3


def load_kernels(model: FrozenModel, parts: Collection[str], cache_dir: Path | None) -> Kernels | None:
    """Compiled kernels, or None where they are not asked for, not installed, or of no use to this model."""
    if "compiled" not in parts or model.device.type != "cpu" or model.dtype not in AS_NUMPY:
        return None
    try:
        from server.engine.kernels import compile_kernels
    except ImportError as exc:
        log.warning("decoding will be slower, because numba is missing: %s", exc)
        return None
    return compile_kernels(cache_dir)


@torch.inference_mode()
def optimise(model: FrozenModel, parts: Collection[str], kernels: Kernels | None) -> None:
    """Rewrite a model's layers in place, as far as `parts` ask for it and the model allows it."""
    model.kernels = kernels
    done = [] if kernels is None else ["compiled kernels"]
    operators = Operators() if kernels is None else CompiledOperators(kernels)
    if "fused" in parts and _fuse(model, operators, pack="packed" in parts):
        done.append("fused layers")
    if "packed" in parts and _pack(model.module):
        done.append("packed weights")
    log.info("optimised: %s", ", ".join(done) or "nothing")


def _fuse(model: FrozenModel, operators: Operators, *, pack: bool) -> bool:
    """Replace all decoder layers; False, and nothing changed, if one of them is not what the replacement computes."""
    decoder = model.module.get_decoder()  # type: ignore[no-untyped-call]
    layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module):
        return False
    if not all(map(has_known_parts, layers)):
        return False
    probe = _Probe(model, rotary, operators)
    if probe.rotated_dim != model.spec.head_dim:
        return False

    def fused(index: int) -> FusedLayer:
        layer = layers[index]
        pack_layer = pack and can_pack(next(layer.parameters()))
        return FusedLayer(layer, index, model.attention_rules[index], model.spec.head_dim, operators, pack=pack_layer)

    # Twice, so that there is never more than one layer too many in memory.
    if not all(probe.agree(layer, fused(index)) for index, layer in enumerate(layers)):
        log.info("the layers of %s are not what they look like; they stay as transformers wrote them", model.spec.name)
        return False
    for index in range(len(layers)):
        layers[index] = fused(index)
    decoder.rotary_emb = FusedRotary(rotary, operators)
    return True


def _pack(module: nn.Module) -> bool:
    """Pack every linear layer that is left; True if oneDNN packs the model's weights at all."""
    packed = False
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            packed |= isinstance(child, FrozenLinear) and child.is_packed
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, FrozenLinear(child.weight, child.bias, pack=True))
                packed = True
    return packed


class _Probe:
    """A few tokens, to compare a layer with its replacement on."""

    def __init__(self, model: FrozenModel, rotary: nn.Module, operators: Operators) -> None:
        num_tokens = sum(PROBE_ROWS)
        # Ids from all over the vocabulary: its first ones are often special tokens that were never trained.
        ids = torch.linspace(0, model.spec.vocab_size - 1, num_tokens, device=model.device).long()
        self._x = model.embed(ids).unsqueeze(0)
        self._position_ids = torch.cat([torch.arange(7, 7 + count, device=model.device) for count in PROBE_ROWS])[None]
        self._plain = rotary(self._x, position_ids=self._position_ids)
        self._fused = FusedRotary(rotary, operators)(self._x, position_ids=self._position_ids)
        self._largest = LARGEST_DIFFERENCE.get(model.dtype, LARGEST_DIFFERENCE_OTHERWISE)

    @property
    def rotated_dim(self) -> int:
        """Numbers of a head that the rotary embedding turns; some models leave a part of each head as it is."""
        return int(self._plain[0].shape[-1])

    def agree(self, layer: nn.Module, fused: FusedLayer) -> bool:
        """Whether both add the same to their input."""
        expected = self._added_by(layer, self._plain)
        error = self._added_by(fused, self._fused) - expected
        return bool(error.norm() <= self._largest * expected.norm())

    def _added_by(self, layer: nn.Module, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = layer(
            self._x,
            attention_mask=None,
            position_ids=self._position_ids,
            position_embeddings=position_embeddings,
            layout=PackedRows(PROBE_ROWS),
        )
        return out.double() - self._x.double()
