"""The frozen model: transformers' own modules, called with one flat row of tokens.

Nothing in this module writes to a weight. The same object is used for serving and training; training only computes
gradients with respect to the input embeddings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from server.contracts import ModelSpec
from server.engine.attention.interface import Layout
from server.engine.model import device_defaults, loading
from server.engine.model.compatibility import pin_longrope, probe_attention
from server.engine.model.devices import choose_device, choose_dtype
from server.engine.model.exactness import refuse_inexact
from server.engine.model.hybrids import prepare_layers
from server.engine.model.load_errors import as_sentence
from server.engine.model.preflight import free_memory
from server.engine.model.weights import resolve_checkpoint
from server.engine.text.model_text import ModelText
from server.errors import UnsupportedModel
from server.settings import Settings, SpecialTokensInInput

if TYPE_CHECKING:  # numba is imported only if it is used
    from server.engine.kernels.library import Kernels

log = logging.getLogger(__name__)

FINGERPRINT_ROWS = 64


class FrozenModel:
    """One causal language model in memory, with its tokenizer.

    Attributes:
        spec: facts about the model for the rest of the server.
        module: transformers' model; every parameter has `requires_grad=False`.
        text: converts texts to token ids and back; safe from any thread.
        eos_token_ids: tokens that end a generation, from the generation config, the config and the tokenizer.
        kernels: compiled kernels for the model; see `optimise.py`.
        keeps_early: whether the last layer computes only the rows whose logits are needed.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_model_len: int,
        special_tokens_in_input: SpecialTokensInInput = "text",
    ) -> None:
        """Take a loaded model, whose attention is already Prelude's; raises UnsupportedModel with the reason."""
        self.kernels: Kernels | None = None
        self.keeps_early = False
        module.eval()  # type: ignore[no-untyped-call]
        self.module = module.requires_grad_(False)
        self.tokenizer = tokenizer
        text_config = module.config.get_text_config()
        layers = prepare_layers(module)
        kv_heads, head_dim, self.attention_rules = probe_attention(module, layers.num_attention_layers)
        limit = device_defaults.longest_context(text_config) or max_model_len
        weights = module.get_input_embeddings().weight
        assert isinstance(weights, torch.Tensor), "an embedding layer has a weight"
        _refuse_other_rows(module, weights.shape[0])
        self.eos_token_ids, end_token_id = _end_tokens(module, tokenizer, weights.shape[0])
        self.spec = ModelSpec(
            name=name,
            fingerprint=_fingerprint(text_config, weights, kv_heads, head_dim),
            hidden_size=weights.shape[1],  # a few models widen their embeddings later
            num_hidden_layers=text_config.num_hidden_layers,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=weights.shape[0],
            max_model_len=min(max_model_len, limit),
            dtype=str(module.dtype).removeprefix("torch."),
            device=str(module.device),
            num_attention_heads=getattr(text_config, "num_attention_heads", None),
            num_attention_layers=layers.num_attention_layers if layers.state_width else None,
            state_width=layers.state_width,
        )
        self.text = ModelText(tokenizer, self.spec, end_token_id, special_tokens_in_input=special_tokens_in_input)
        pin_longrope(module, self.spec.max_model_len)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @classmethod
    def load(cls, settings: Settings) -> FrozenModel:
        """Load the model that the settings name; raises ConfigurationError if it cannot be found or served."""
        checkpoint = resolve_checkpoint(settings.model, settings.model_name, settings.cache_dir)
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        log.info("loading %s in %s on %s", checkpoint.name, str(dtype).removeprefix("torch."), device)
        module, tokenizer = loading.load(checkpoint.location, device, dtype)
        free = free_memory(device)
        length = device_defaults.max_model_len(settings, module.config, module.dtype, device.type, free)
        special = settings.special_tokens_in_input
        with as_sentence(f"The model {checkpoint.location} cannot be used"):
            model = cls(module, tokenizer, name=checkpoint.name, max_model_len=length, special_tokens_in_input=special)
            refuse_inexact(model)
        log.info("loaded %s", _size(module))
        return model

    def embeddings_of(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings `[tokens, hidden_size]` of a text, on the CPU like the tensor of a soft prompt."""
        self.text.check_tokens(token_ids)
        with torch.no_grad():
            return self.embed(torch.tensor(token_ids, device=self.device)).cpu()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings `[tokens, hidden_size]`, as in the model's own forward."""
        embeddings: torch.Tensor = self.module.get_input_embeddings()(token_ids)
        return embeddings

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[kept, vocab_size]`, in the model's dtype, of the rows in `keep`.

        Args:
            inputs_embeds: `[tokens, hidden_size]`.
            position_ids: `[tokens]`, each token's position in its own sequence.
            layout: assigns tokens to sequences.
            keep: `[kept]`, indices into the flat row.
        """
        output = self.module(
            inputs_embeds=inputs_embeds.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            layout=layout,
            **({"logits_to_keep": 0, "kept": keep} if self.keeps_early else {"logits_to_keep": keep}),
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _size(module: PreTrainedModel) -> str:
    parameters = list(module.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    held = sum(parameter.nbytes for parameter in parameters)
    return f"{count / 1e6:,.0f} million parameters in {held / 2**20:,.0f} MiB"


def _fingerprint(config: PretrainedConfig, embeddings: torch.Tensor, kv_heads: int, head_dim: int) -> str:
    """A hash of the config's sizes and of some embedding rows in bfloat16, to which all served dtypes round alike."""
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


def _refuse_other_rows(module: PreTrainedModel, rows: int) -> None:
    """Refuse a model with different numbers of input embeddings and logits."""
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits = rows if head is None else head.weight.shape[0]
    if logits != rows:
        raise UnsupportedModel(f"The model has embeddings for {rows:,} tokens and logits for {logits:,}.")


def _end_tokens(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[frozenset[int], int | None]:
    """The token ids that end a generation, and the id that training puts after every target.

    A chat fine-tune often names its end of turn in only one of the three sources, so the ids of all sources count.
    Training uses the lowest id of the first source that names one, because existing soft prompts were trained with it.
    """
    generation = getattr(module.generation_config, "eos_token_id", None)
    found: dict[str, list[int]] = {}
    for source, ids in (
        ("generation_config.json", generation),
        ("config.json", getattr(module.config.get_text_config(), "eos_token_id", None)),
        ("the tokenizer", tokenizer.eos_token_id),
    ):
        named = list(ids) if isinstance(ids, Sequence) else [] if ids is None else [ids]
        found[source] = [token_id for token_id in named if 0 <= token_id < rows]
        for token_id in set(named).difference(found[source]):
            log.warning("%s names the end token %d; the model has the tokens 0 to %d only", source, token_id, rows - 1)
    first: list[int] = next((ids for ids in found.values() if ids), [])
    return frozenset(itertools.chain(*found.values())), min(first, default=None)
