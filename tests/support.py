"""Fakes and small builders that tests share: tiny random models, a byte tokenizer, soft prompts, and a way to run them.

A tiny model is a real transformers architecture with random weights, built from a config without a download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from server.contracts import Candidate, FinishReason, GenerationRequest, ModelSpec, SamplingParams, Scored, Usage
from server.engine.attention.interface import ATTENTION_NAME, Layout, register_attention
from server.engine.engine import Engine
from server.engine.fast.optimise import load_kernels, optimise
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.model.frozen import FrozenModel
from server.settings import Settings
from server.soft_prompts.manifest import Manifest
from server.soft_prompts.soft_prompt import SoftPrompt

EOS = 256
VOCAB_SIZE = 260

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 257,
}
# Untied, because Gemma's scaled embeddings would otherwise make a random model repeat its last token.
_GEMMA = {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"head_dim": 8},
    "mistral": _SIZES | {"sliding_window": 8},
    "gemma2": _SIZES | _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _SIZES | _GEMMA,
    "phi3": _SIZES | {"sliding_window": 8},
    "olmo2": _SIZES,
    "gpt_neox": {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    | {"hidden_size": 16, "num_attention_heads": 2},
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 256,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": 257,
    },
    "opt": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": 257,
    },
}
"""Architectures whose answers are compared with PEFT's, as small as their configs allow."""


HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": _SIZES
    | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": False},
    "qwen3_5_text": _SIZES
    | {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "tie_word_embeddings": False,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
    },
}
"""Architectures with layers that keep a recurrent state; they take no soft prompts of keys and values."""


def skip_unless_served(architecture: str) -> None:
    """Skip a test whose model this version of transformers does not run as the engine needs it."""
    if architecture == "lfm2" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22):
        pytest.skip("its layers do not get the forward's keywords")


def tiny_module(architecture: str = "llama", *, dtype: torch.dtype = torch.float64, attention: str) -> PreTrainedModel:
    """A random model of an architecture; the same weights for every attention implementation."""
    skip_unless_served(architecture)
    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(TINY | HYBRIDS)[architecture])
    module: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=attention
    )
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            # Larger than a trained model's, so that answers depend on every token in sight.
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    module.tie_weights()
    module.to(dtype)  # type: ignore[arg-type]
    module.eval()  # type: ignore[no-untyped-call]
    return module


def byte_tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """One token per byte, ids 0-255; end of sequence is 256; `added` are special tokens from 258 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<pad>", *added])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )


def tiny_model(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float64, max_model_len: int = 128
) -> FrozenModel:
    """A frozen tiny model, ready for the engine."""
    module = tiny_module(architecture, dtype=dtype, attention=ATTENTION_NAME)
    return FrozenModel(module, byte_tokenizer(), name=f"tiny-{architecture}", max_model_len=max_model_len)


def fast_smollm2(dtype: str) -> FrozenModel:
    """The embedded model as a server runs it."""
    settings = Settings.load(dtype=dtype)
    model = FrozenModel.load(settings)
    kernels = load_kernels(model, settings.optimisations, settings.cache_dir / "kernels")
    optimise(model, settings.optimisations, kernels)
    return model


class RecordingModel(FrozenModel):
    """A frozen model that keeps the logits of its last step, to look at them afterwards."""

    def __init__(self, model: FrozenModel) -> None:
        """Share everything with `model`."""
        self.__dict__.update(model.__dict__)
        self.last_logits = torch.empty(0)

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        """As the model's own, kept."""
        self.last_logits = super().forward(inputs_embeds, position_ids, layout, keep)
        return self.last_logits


def logits_of_requests(engine: Engine, model: RecordingModel) -> dict[str, torch.Tensor]:
    """Run an engine to its end and answer, per request, the logits `[new tokens, vocab_size]` it was answered from."""
    rows: dict[str, list[torch.Tensor]] = {}
    while engine.has_work:
        deltas = engine.step()
        for delta, row in zip(deltas, model.last_logits, strict=False):  # rows of padding follow
            rows.setdefault(delta.request_id, []).append(row)
    return {request_id: torch.stack(logits) for request_id, logits in rows.items()}


def make_engine(
    model: FrozenModel,
    *,
    max_sequences: int = 8,
    max_batch_tokens: int = 16,
    num_slabs: int = 8,
    prefix_bytes: int = 2**20,
    shortest_slot: int = 32,
    shared_bytes: int | None = None,
) -> Engine:
    """An engine with small limits, so that chunks, queues and slot lengths all come into play."""
    kv_cache = KVCache(model.spec, num_slabs, shortest_slot)
    return Engine(model, kv_cache, PrefixCache(prefix_bytes), max_sequences, max_batch_tokens, shared_bytes)


def random_soft_prompt(
    model: ModelSpec, num_virtual_tokens: int = 5, seed: int = 0, manifest: Mapping[str, Any] | None = None
) -> SoftPrompt:
    """A soft prompt of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(num_virtual_tokens, model.hidden_size, generator=generator)
    return SoftPrompt("PROMPT_TUNING", tensor, Manifest.model_validate(manifest or {}))


def random_kv_prompt(model: ModelSpec, num_virtual_tokens: int = 5, seed: int = 0) -> SoftPrompt:
    """A prefix-tuning soft prompt of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt("PREFIX_TUNING", torch.randn(num_virtual_tokens, model.kv_width, generator=generator))


def random_other_prompt(model: ModelSpec, num_virtual_tokens: int = 5, seed: int = 0) -> SoftPrompt:
    """A soft prompt of the other kind, keys and values, where the model takes them."""
    make = random_soft_prompt if model.state_width else random_kv_prompt
    return make(model, num_virtual_tokens, seed)


@dataclass
class Outcome:
    """Everything that an engine answered to one choice of a request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float | None] = field(default_factory=list)
    top: list[tuple[Candidate, ...]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    lasts: int = 0
    ends: int = 0
    error: Exception | None = None


def request(
    request_id: str,
    input_ids: Sequence[int],
    task: str | None = None,
    *,
    key_id: str | None = None,
    n: int = 1,
    input_logprobs: bool = False,
    labels: Sequence[Sequence[int]] = (),
    **sampling: Any,
) -> GenerationRequest:
    """A request of the engine."""
    return GenerationRequest(
        request_id,
        tuple(input_ids),
        SamplingParams(**sampling),
        task,
        key_id,
        n=n,
        input_logprobs=input_logprobs,
        labels=tuple(map(tuple, labels)),
    )


def run_engine(
    engine: Engine,
    requests: Iterable[tuple[GenerationRequest, SoftPrompt | None]],
    *,
    arrive_every: int = 0,
    abort: Mapping[int, str] | None = None,
) -> dict[str, Outcome]:
    """Run requests to their ends; the outcome of the choice 2 of the request `r` is `r/2`, that of 0 just `r`.

    Args:
        engine: the engine; idle before and after.
        requests: with their soft prompts.
        arrive_every: steps between two arrivals; 0 lets all arrive at once.
        abort: step -> id of a request that is aborted after it.
    """
    outcomes: dict[str, Outcome] = {}
    arrivals = list(requests)
    steps = 0
    while arrivals or engine.has_work:
        while arrivals and (not arrive_every or steps % arrive_every == 0 or not engine.has_work):
            accepted, soft_prompt = arrivals.pop(0)
            outcomes[accepted.request_id] = Outcome()
            engine.check(accepted, soft_prompt)
            engine.add(accepted, soft_prompt)
            if arrive_every:
                break
        deltas = engine.step()
        steps += 1
        assert steps < 10_000, "the engine does not come to an end"
        if abort and steps in abort:
            deltas += [delta for delta in [engine.abort(abort[steps])] if delta is not None]
        for delta in deltas:
            name = f"{delta.request_id}/{delta.index}" if delta.index else delta.request_id
            outcome = outcomes.setdefault(name, Outcome())
            outcome.scored += delta.scored
            if delta.token is not None:
                outcome.top.append(delta.token.top)
                outcome.token_ids.append(delta.token.id)
                outcome.logprobs.append(delta.token.logprob)
                outcome.text += delta.token.text
            if delta.finish_reason is not None:
                outcome.ends += 1
                outcome.lasts += delta.is_last
                outcome.finish_reason = delta.finish_reason
                outcome.usage = delta.usage and replace(
                    delta.usage,
                    queued_seconds=0.0,
                    prefix_seconds=0.0,  # a time is never the same
                )
                outcome.error = delta.error
    engine.check_integrity()
    return outcomes


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over all parameters and buffers, to prove that nothing has written to the frozen model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
