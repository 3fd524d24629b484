"""The frozen model: transformers' own modules, used as they are, behind one flat row of tokens.

Nothing here ever writes to a weight. The same object serves and trains: training only asks for gradients with respect
to the input embeddings.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from server.core import ModelSpec
from server.engine.attention import ATTENTION_NAME, AttentionRules, Layout, PackedRows, register_attention
from server.engine.checkpoint import resolve_checkpoint
from server.errors import ConfigurationError, UnsupportedModel
from server.settings import Settings

log = logging.getLogger(__name__)

FINGERPRINT_ROWS = 64


class FrozenModel:
    """One causal language model in memory, with its tokenizer.

    Attributes:
        spec: what the rest of the server may know of it.
        module: transformers' model; every parameter has `requires_grad=False`.
        tokenizer: its tokenizer.
        eos_token_ids: tokens that end a generation.
    """

    def __init__(
        self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, max_model_len: int
    ) -> None:
        """Take a loaded model. Its attention implementation must be ours already.

        Raises:
            UnsupportedModel: the engine cannot serve it, with the reason.
        """
        self.module = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eos_token_ids = _eos_token_ids(module, tokenizer)
        text_config = module.config.get_text_config()
        kv_heads, head_dim = _probe_attention(module)
        limit = getattr(text_config, "max_position_embeddings", None) or max_model_len
        weights = module.get_input_embeddings().weight
        self.spec = ModelSpec(
            name=name,
            fingerprint=_fingerprint(text_config, weights, kv_heads, head_dim),
            hidden_size=text_config.hidden_size,
            num_hidden_layers=text_config.num_hidden_layers,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=weights.shape[0],
            max_model_len=min(max_model_len, limit),
            dtype=str(module.dtype).removeprefix("torch."),
            device=str(module.device),
        )
        _pin_longrope(module, self.spec.max_model_len)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are in."""
        return self.module.dtype

    @classmethod
    def load(cls, settings: Settings) -> FrozenModel:
        """Load the model that the settings name.

        Raises:
            ConfigurationError: it cannot be found, or (UnsupportedModel) cannot be served.
        """
        checkpoint = resolve_checkpoint(settings.model, settings.model_name, settings.cache_dir)
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        log.info("loading %s in %s on %s", checkpoint.name, str(dtype).removeprefix("torch."), device)
        try:
            config = AutoConfig.from_pretrained(checkpoint.location)
            refuse_unsupported(config)
            register_attention()
            module = AutoModelForCausalLM.from_pretrained(
                checkpoint.location, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME
            ).to(device)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.location)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"The model {checkpoint.location} cannot be loaded: {exc}",
                remedy="Let PRELUDE_MODEL name a causal language model: a hub id, a directory or a GGUF file.",
            ) from exc
        return cls(module, tokenizer, name=checkpoint.name, max_model_len=settings.max_model_len)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer adds one."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[tokens, hidden_size]` as the model's own forward would make them."""
        embeddings: torch.Tensor = self.module.get_input_embeddings()(token_ids)
        return embeddings

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[kept, vocab_size]`, in at least float32, of the flat-row indices in `keep`.

        Args:
            inputs_embeds: `[tokens, hidden_size]`.
            position_ids: `[tokens]`, each token's position in its own sequence.
            layout: whose token is whose.
            keep: `[kept]`, indices into the flat row.
        """
        output = self.module(
            inputs_embeds=inputs_embeds.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            layout=layout,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if logits.dtype == torch.float64 else logits.float()


def choose_device(device: str) -> torch.device:
    """'auto' is the first CUDA device, else the CPU.

    Raises:
        ConfigurationError: CUDA is asked for where there is none, or the name is not a device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as exc:
        raise ConfigurationError(f"PRELUDE_DEVICE is {device!r}.", remedy="Use auto, cpu, cuda or cuda:0.") from exc
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "PRELUDE_DEVICE asks for CUDA, and torch sees none.", remedy="Use cpu, or install a CUDA build of torch."
        )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    capabilities = torch.cpu.get_capabilities()
    native = device.type == "cuda" or capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Refuse, by the config alone, what the engine cannot serve exactly.

    Raises:
        UnsupportedModel: says which property of the model is in the way.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{kind} is an encoder-decoder model; the engine serves decoder-only ones.")
    text_config = config.get_text_config()
    layers = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise UnsupportedModel(
            f"{kind} has {', '.join(sorted(layers))} layers; the engine keeps keys and values of full and sliding "
            "attention only."
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "dynamic" in _rope_types(rope):
        raise UnsupportedModel(
            f"{kind} uses dynamic rotary scaling, whose frequencies depend on the longest sequence of a batch: one "
            "request would change another's answer.",
            remedy="Use a model with linear, yarn, llama3 or longrope scaling.",
        )


def _rope_types(rope_parameters: object) -> set[str]:
    if not isinstance(rope_parameters, dict):
        return set()
    own = {str(rope_parameters["rope_type"])} if "rope_type" in rope_parameters else set()
    return own.union(*(_rope_types(value) for value in rope_parameters.values()))


class _AttentionProbe:
    """A layout that looks at what every layer hands over and attends within one row."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer -> kv_heads, key dim, value dim
        self.windows: dict[int, int | None] = {}
        self._row = PackedRows([2])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules
    ) -> torch.Tensor:
        self.shapes[layer] = (key.shape[0], key.shape[2], value.shape[2])
        self.windows[layer] = rules.sliding_window
        return self._row.attend(layer, query, key, value, rules)


@torch.inference_mode()
def _probe_attention(module: PreTrainedModel) -> tuple[int, int]:
    """Run two tokens through the model and learn `(kv_heads, head_dim)` from what its layers really hand over.

    Raises:
        UnsupportedModel: the attention does not come through our function in every layer, in one shape.
    """
    kind = module.config.model_type
    probe = _AttentionProbe()
    try:
        embeddings = module.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long, device=module.device))
        position_ids = torch.arange(2, device=module.device).unsqueeze(0)
        module(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, layout=probe)
    except UnsupportedModel:
        raise
    except Exception as exc:
        raise UnsupportedModel(f"{kind} does not run with the engine's attention: {exc}.") from exc
    layers = module.config.get_text_config().num_hidden_layers
    if set(probe.shapes) != set(range(layers)):
        raise UnsupportedModel(
            f"Of the {layers} layers of {kind}, {len(probe.shapes)} hand their keys and values to transformers' "
            "AttentionInterface; the others are recurrent, share a cache, or do their own attention."
        )
    kv_heads, key_dim, value_dim = probe.shapes[0]
    if len(set(probe.shapes.values())) != 1 or key_dim != value_dim:
        raise UnsupportedModel(f"The keys and values of {kind} differ in shape between layers, or from each other.")
    layer_types = getattr(module.config.get_text_config(), "layer_types", None) or []
    for layer, layer_type in enumerate(layer_types):
        if layer_type == "sliding_attention" and probe.windows[layer] is None:
            raise UnsupportedModel(f"{kind} has sliding-window layers but does not tell the attention their window.")
    return kv_heads, key_dim


def _fingerprint(config: PretrainedConfig, embeddings: torch.Tensor, kv_heads: int, head_dim: int) -> str:
    """Identity of the frozen model: shape-giving config fields and a sample of embedding rows in bfloat16.

    bfloat16 is what every served dtype rounds to in the same way, so the fingerprint does not depend on it.
    """
    fields = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": embeddings.shape[0],
    }
    rows = torch.linspace(0, embeddings.shape[0] - 1, FINGERPRINT_ROWS, dtype=torch.float64).round().long()
    sample = embeddings.detach()[rows.to(embeddings.device)].to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _eos_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(module.generation_config, "eos_token_id", None)
    found: set[int] = set()
    for ids in (generation, module.config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, Sequence) else [] if ids is None else [ids])
        if found:
            break
    return frozenset(found)


def _pin_longrope(module: nn.Module, max_model_len: int) -> None:
    """Keep longrope in one regime for the whole server, whatever the longest sequence of a batch is.

    transformers switches all rows to the long factors as soon as one row is long, which would let one request change
    another's answer. A server whose context exceeds the original one uses the long factors throughout.
    """
    for part in module.modules():
        if getattr(part, "rope_type", None) != "longrope":
            continue
        original = part.config.rope_parameters["original_max_position_embeddings"]
        if max_model_len > original:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            device = part.inv_freq.device
            long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](part.config, device, seq_len=original + 1)
            part.original_inv_freq = part.long_inv_freq = long_inv_freq
            part.inv_freq.copy_(long_inv_freq)


def weights_hash(module: nn.Module) -> str:
    """sha256 over every parameter and buffer: proof that nothing wrote to the frozen model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
