"""A tiny model of any family of causal language models in transformers, and what people know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from server.engine.attention.interface import ATTENTION_NAME, register_attention
from server.engine.model.preflight import auto_class

_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 64,
    "image_size": 32,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 4,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "max_seq_len": 256,
    "rotary_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 8,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "activation_sparsity_pattern": 0.0,
}
"""Values for those of these fields that a config has."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HYBRID = ["conv", "full_attention"] * 2

_MROPE = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}}

_OVER: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4},
    },
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "lfm2": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": _HYBRID},
    "lfm2_vl": {"text_config": {"layer_types": _HYBRID}},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "nemotron": {"num_key_value_heads": 2},
    "phimoe": {"sliding_window": None},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""What a family needs beside small numbers: values of its own, or None for a field that is left as it is."""


EXAMPLES = {
    "afmoe": "Trinity",
    "apertus": "Apertus",
    "bamba": "Bamba",
    "cohere2": "Command R7B, Command A",
    "cohere": "Command R",
    "deepseek_v2": "DeepSeek V2 (Lite)",
    "deepseek_v3": "DeepSeek V3 and R1, Kimi K2",
    "deepseek_v32": "DeepSeek V3.2",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B, 300B",
    "exaone4": "EXAONE 4",
    "falcon_h1": "Falcon-H1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B, 27B (their text part)",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n": "Gemma 3n E2B, E4B",
    "gemma4": "Gemma 4",
    "glm4": "GLM-4 9B, 32B",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "glm4_moe_lite": "GLM-4.7 Flash",
    "gpt_neox": "Pythia",
    "gpt_oss": "gpt-oss 20B, 120B",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 4 H",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "kimi_linear": "Kimi Linear",
    "lfm2": "LFM2, LFM2.5",
    "lfm2_moe": "LFM2-8B-A1B, LFM2-24B-A2B",
    "lfm2_vl": "LFM2-VL (its text part)",
    "lfm3": "LFM3",
    "llama": "Llama 2 and 3, SmolLM2, Yi, TinyLlama",
    "llama4": "Llama 4",
    "minimax_m2": "MiniMax M2",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3 (text checkpoints)",
    "mistral": "Mistral 7B, Mistral Nemo",
    "mistral3": "Mistral Small 3.1 and 3.2, Ministral 3 (their text part)",
    "mixtral": "Mixtral",
    "nemotron_h": "Nemotron-H, Nemotron 3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "phi": "Phi-2",
    "phi3": "Phi-3, Phi-4",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen2_5_vl": "Qwen2.5-VL (its text part)",
    "qwen3_5": "Qwen3.5",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next",
    "qwen3_vl": "Qwen3-VL (its text part)",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "starcoder2": "StarCoder2",
    "zamba2": "Zamba2",
}
"""What people know of a family."""


def tiny_config(family: str, **fields: Any) -> PretrainedConfig:
    """A family's own config, with small numbers in the fields that it has; `fields` come before those."""
    return _shrunk(AutoConfig.for_model(family), _OVER.get(family, {}) | fields)


def _shrunk(base: Any, over: Mapping[str, Any]) -> PretrainedConfig:
    """A config with small numbers, in the configs of its parts too, and with the layer types that it has."""
    fields = {name: value for name, value in _SMALL.items() if _has(base, name)}
    if kinds := list(dict.fromkeys(vars(base).get("layer_types") or ())):
        fields["layer_types"] = (kinds * 4)[:4]
    rope = vars(base).get("rope_parameters") or {}
    if "mrope_section" in rope:  # it cuts half a head
        fields["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    if "kv_lora_rank" in fields:  # latent attention: heads are not grouped
        fields |= {"num_key_value_heads": fields["num_attention_heads"], "head_dim": fields["qk_rope_head_dim"]}
    fields |= over
    for name in base.sub_configs:
        if isinstance(part := getattr(base, name, None), PretrainedConfig):
            fields[name] = _shrunk(part, over.get(name, {}))
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        config: PretrainedConfig = type(base)(**fields)
    except Exception:  # noqa: BLE001 - some families compute the size of a head
        fields.pop("head_dim", None)
        config = type(base)(**fields)
    return config


def _has(config: Any, name: str) -> bool:
    """Whether a config has a field, and some value in it or one of those that are often empty."""
    try:
        known = hasattr(config, name) or name in getattr(config, "attribute_map", {})
        empty = getattr(config, name, None) is None
    except AmbiguousGlobalPerLayerAttributeError:
        return True
    return known and (not empty or name in ("sliding_window", "pad_token_id", "head_dim"))


def tiny_family(family: str, attention: str = ATTENTION_NAME, **fields: Any) -> PreTrainedModel:
    """A tiny model of a family, with random weights that let answers depend on every token in sight."""
    register_attention()
    torch.manual_seed(0)
    config = tiny_config(family, **fields)
    module: Any = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.1)
    found: PreTrainedModel = module.eval()
    return found
