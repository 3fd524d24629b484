"""Defaults of settings on CUDA, where more requests run at a time than on a CPU.

The defaults in `server/settings.py` are for CPUs. A value that the user has set is never changed.
"""

import torch
from transformers import PretrainedConfig

from server.contracts import ModelSpec
from server.settings import Settings

SEQUENCES = 256
BATCH_TOKENS = 8192
"""Defaults on CUDA."""

LOGITS_SHARE = 16
"""By default, the logits of a whole step take at most 1/16 of the free memory."""

SLOTS_OF_LONGEST = 16
"""By default, half of the free memory holds at least this many sequences of the longest context."""


def max_sequences(settings: Settings, device: torch.device) -> int:
    """Maximum number of running sequences."""
    if device.type != "cuda" or "max_sequences" in settings.model_fields_set:
        return settings.max_sequences
    return min(SEQUENCES, settings.max_batch_tokens) if "max_batch_tokens" in settings.model_fields_set else SEQUENCES


def max_batch_tokens(settings: Settings, model: ModelSpec, free: int) -> int:
    """Maximum number of tokens in a step; on CUDA, the default depends on the free bytes."""
    if not model.device.startswith("cuda") or "max_batch_tokens" in settings.model_fields_set:
        return settings.max_batch_tokens
    row = model.vocab_size * int(getattr(torch, model.dtype).itemsize)
    tokens = BATCH_TOKENS
    while tokens > settings.max_batch_tokens and tokens * row > free // LOGITS_SHARE:
        tokens //= 2
    return max(tokens, settings.max_sequences)


def max_model_len(settings: Settings, config: PretrainedConfig, dtype: torch.dtype, device: str, free: int) -> int:
    """Positions of the longest context; on CUDA, the default is the model's own, as far as the free bytes allow."""
    if not device.startswith("cuda") or "max_model_len" in settings.model_fields_set:
        return settings.max_model_len
    text = config.get_text_config()
    own = longest_context(text) or settings.max_model_len
    try:
        heads = getattr(text, "num_attention_heads", None) or 1
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or -(-text.hidden_size // heads)
        position = int(text.num_hidden_layers * 2 * kv_heads * head_dim * dtype.itemsize)
    except Exception:  # noqa: BLE001 - some configs have them for each layer, or not at all, and raise anything
        return min(own, settings.max_model_len)
    length = 1 << (own - 1).bit_length()  # length of a slab, which is a power of two
    while length > settings.max_model_len and SLOTS_OF_LONGEST * length * position > free // 2:
        length //= 2
    return int(min(own, length))


def longest_context(text_config: PretrainedConfig) -> int | None:
    """The number of positions for which a model was trained; None if the config has none, or 0 or -1 for unlimited."""
    own = getattr(text_config, "max_position_embeddings", None)
    return own if isinstance(own, int) and own > 0 else None


def filled_in(settings: Settings, model: ModelSpec, free: int) -> Settings:
    """The settings with these defaults filled in, for a loaded model and `free` bytes of remaining memory."""
    settings = settings.model_copy(update={"max_sequences": max_sequences(settings, torch.device(model.device))})
    return settings.model_copy(update={"max_batch_tokens": max_batch_tokens(settings, model, free)})


def as_served(settings: Settings, model: ModelSpec) -> Settings:
    """The settings for parts outside the engine: limits of admission, and the context of training jobs."""
    if not model.device.startswith("cuda"):
        return settings
    sequences = max_sequences(settings, torch.device(model.device))
    return settings.model_copy(update={"max_sequences": sequences, "max_model_len": model.max_model_len})
