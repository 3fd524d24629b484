"""Makes a loaded model faster without changing its results: one pass over the model at start.

The engine does not depend on this pass, and each part can be switched off (`PRELUDE_OPTIMISE`):

    fused      decoder layers of the Llama family in a handful of operators          fused.py
    packed     weights of matrix products laid out for the CPU's library, once       linear.py
    compiled   attention, and the norms, rotary embeddings and gates of fused        kernels/, operators.py,
               layers, by machine code made at the start                             attention/compiled_rows.py
    graphs     steps that only decode as CUDA graphs, once the engine is built       decode_graphs.py

Layers are replaced only if the replacements give the same results for a few tokens; otherwise the model runs unchanged.
An optimised model gives no gradients, so training uses the model as it was loaded.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from server.engine.attention.cached_rows import Span
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.attention.interface import PackedRows
from server.engine.attention.recurrent import RecurrentRows, ServingRows
from server.engine.fast.chained import ChainedLayers, can_chain
from server.engine.fast.fused import FusedEmbedding, FusedLayer, FusedNorm, FusedRotary, has_known_parts
from server.engine.fast.linear import FrozenLinear, can_pack
from server.engine.fast.operators import COMPILED_DTYPES, CompiledOperators, Operators, operators_with
from server.engine.fast.tiled import TiledLinear, frozen_linear
from server.engine.kernels.units import BIAS, GATE, RESIDUAL
from server.engine.memory.kv_cache import KVCache
from server.engine.model.frozen import FrozenModel

if TYPE_CHECKING:
    from server.engine.kernels.library import Kernels

log = logging.getLogger(__name__)

PROBE_ROWS = (3, 5)
"""Lengths of the rows of tokens on which a layer and its replacement are compared."""

LARGEST_DIFFERENCE = 1e-4
"""Largest relative error (root mean square) in what a layer adds to its input: more than float32 rounding explains."""


LARGEST_TABLES = 2**26
"""Largest size in bytes of the tables of rotary embeddings; angles of longer contexts are computed in each step."""


def load_kernels(model: FrozenModel, parts: Collection[str], cache_dir: Path | None) -> Kernels | None:
    """Load and test the compiled kernels; None if `parts` lacks "compiled", or this model or machine cannot use them.

    Their machine code is kept in `cache_dir`, if it is writable; unreadable entries are compiled again.
    """
    if "compiled" not in parts or model.device.type != "cpu" or model.dtype not in COMPILED_DTYPES:
        return None
    try:
        from server.engine.kernels.library import use_kernels
    except ImportError as exc:
        log.warning("decoding will be slower, because numba is missing: %s", exc)
        return None
    if cache_dir is None or not _can_write(cache_dir):
        return use_kernels(None)
    if not any(cache_dir.iterdir()):
        log.info("compiling kernels, once; later starts read them from %s", cache_dir)
    try:
        kernels = use_kernels(cache_dir)
        _try_out(kernels, model)
    except OSError as exc:
        log.warning("the kernels cannot be kept in %s: %s", cache_dir, exc.strerror or exc)
        return use_kernels(None)
    except Exception:  # noqa: BLE001 - numba unpickles a file that may hold anything, say half of itself
        log.warning("the kernels in %s cannot be read; they are compiled again", cache_dir)
        shutil.rmtree(cache_dir, ignore_errors=True)
        return use_kernels(None)
    return kernels


def _can_write(directory: Path) -> bool:
    """Whether the directory is writable; if not, numba would silently write beside the source code."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as exc:
        log.info("kernels are compiled at every start, because %s cannot be written to: %s", directory, exc.strerror)
        return False


@torch.inference_mode()
def _try_out(kernels: Kernels, model: FrozenModel) -> None:
    """Call each kernel once, which compiles it or loads it from the cache."""
    operators, spec = CompiledOperators(kernels), model.spec
    rows = torch.ones(1, 2 * spec.head_dim, dtype=model.dtype)
    operators.best(operators.silu_gate(operators.rms_norm(rows, rows[0], 1e-5)))
    turns = torch.ones(1, spec.head_dim)
    operators.rotate(rows.view(1, 2, spec.head_dim), turns, turns, 2)
    if kernels.has_tiles and model.dtype == torch.bfloat16:
        has_bias = any(name.endswith(".bias") for name, _ in model.module.named_parameters())
        for kind in (0, RESIDUAL, GATE):
            for bias in (0, BIAS) if has_bias else (0,):
                kernels.product(kind + bias)
        kernels.chain()
    kv_cache = KVCache(dataclasses.replace(spec, max_model_len=16), num_slabs=1)
    attention = CompiledAttention.over(kv_cache, model.attention_rules, kernels)
    if attention is not None:
        slot = kv_cache.allocate(16)
        assert slot is not None, "the pool is empty"
        spans = [Span(slot, 0, 2)]
        layout: ServingRows = CompiledRows(attention, spans)
        if kv_cache.recurrent is not None:
            layout = RecurrentRows(layout, kv_cache.recurrent, spans)
        ids = torch.zeros(2, dtype=torch.long)
        model.forward(model.embed(ids), layout.position_ids, layout, ids[:1])


@torch.inference_mode()
def optimise(model: FrozenModel, parts: Collection[str], kernels: Kernels | None) -> None:
    """Rewrite a model's layers in place, as far as `parts` and the model allow."""
    model.kernels = kernels
    done = [] if kernels is None else ["compiled kernels"]
    operators = operators_with(kernels)
    if "fused" in parts and _fuse(model, operators, pack="packed" in parts):
        done.append("fused layers")
    if "packed" in parts and _pack(model.module, kernels):
        done.append("packed weights")
    log.info("optimised: %s", ", ".join(done) or "nothing")


def _fuse(model: FrozenModel, operators: Operators, *, pack: bool) -> bool:
    """Replace all decoder layers; returns False and changes nothing if a replacement would differ."""
    decoder = model.module.get_decoder()  # type: ignore[no-untyped-call]
    layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module):
        return False
    if not all(map(has_known_parts, layers)):
        return False
    probe = _Probe(model, rotary)
    if probe.rotated_dim != model.spec.head_dim:
        return False

    norm_type = type(layers[0].input_layernorm)
    # All layers are compared before any is replaced, so at most one extra layer is in memory at a time.
    if not all(probe.agree(index, layer) for index, layer in enumerate(layers)):
        log.info("the layers of %s do not compute what the Llama family's do; they stay as they are", model.spec.name)
        return False
    for index, layer in enumerate(layers):
        packs, rules = pack and can_pack(next(layer.parameters())), model.attention_rules[index]
        layers[index] = FusedLayer(layer, index, rules, model.spec.head_dim, operators, pack=packs)
    cast(FusedLayer, layers[-1]).is_last = model.keeps_early = True
    decoder.rotary_emb = FusedRotary(rotary, operators)
    if operators.kernels is not None:
        _tabulate(model, decoder, operators)
    if type(getattr(decoder, "norm", None)) is norm_type:  # the layers' norms have been compared with ours
        decoder.norm = FusedNorm(decoder.norm, operators)
    if operators.kernels is not None and can_chain(layers):
        decoder.layers = nn.ModuleList([ChainedLayers([*layers], operators.kernels)])
    return True


def _tabulate(model: FrozenModel, decoder: nn.Module, operators: Operators) -> None:
    """Let compiled code read embeddings, and angles of rotary embeddings, from tables."""
    num_positions = model.spec.max_model_len
    if 8 * num_positions * model.spec.head_dim <= LARGEST_TABLES:  # cosine and sine in float32
        cast(FusedRotary, decoder.rotary_emb).tabulate(num_positions, model.dtype)
    if type(embedding := getattr(decoder, "embed_tokens", None)) is nn.Embedding:
        decoder.embed_tokens = FusedEmbedding(embedding, operators)


def _pack(module: nn.Module, kernels: Kernels | None) -> bool:
    """Pack every remaining linear layer; returns True if any weights of the model are packed."""
    packed = False
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            packed |= isinstance(child, TiledLinear) or (isinstance(child, FrozenLinear) and child.is_packed)
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, frozen_linear(child.weight, child.bias, kernels))
                packed = True
    return packed


class _Probe:
    """A few tokens for comparing a layer with its replacement, in float32 so that rounding hides no difference."""

    def __init__(self, model: FrozenModel, rotary: nn.Module) -> None:
        num_tokens = sum(PROBE_ROWS)
        # Ids from the whole vocabulary, because the first ids are often special tokens that were never trained.
        ids = torch.linspace(0, model.spec.vocab_size - 1, num_tokens, device=model.device).long()
        x = model.embed(ids).unsqueeze(0)
        self._x = x if x.dtype == torch.float64 else x.float()
        # One row near the start of the context and one at its end, because some models change with the position.
        first, last = PROBE_ROWS
        end = model.spec.max_model_len
        positions = [*range(7, 7 + first), *range(end - last, end)]
        self._position_ids = torch.tensor(positions, device=model.device)[None]
        self._plain = rotary(self._x, position_ids=self._position_ids)
        self.rotated_dim = self._plain[0].shape[-1]  # some models rotate only a part of each head
        self._fused = FusedRotary(rotary, Operators())(self._x, position_ids=self._position_ids)
        self._rules, self._head_dim = model.attention_rules, model.spec.head_dim

    def agree(self, index: int, layer: nn.Module) -> bool:
        """Whether a layer and its replacement add the same to their input."""
        exact = deepcopy(layer).to(self._x.dtype)
        fused = FusedLayer(exact, index, self._rules[index], self._head_dim, Operators(), pack=False)
        expected = self._added_by(exact, self._plain)
        error = self._added_by(fused, self._fused) - expected
        return bool(error.norm() <= LARGEST_DIFFERENCE * expected.norm())

    def _added_by(self, layer: nn.Module, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = layer(
            self._x,
            attention_mask=None,
            position_ids=self._position_ids,
            position_embeddings=position_embeddings,
            layout=PackedRows(PROBE_ROWS),
        )
        return out.double() - self._x.double()
