"""A model that says what it is told, and tokenizers whose decoders take the first space of a text away."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from server.engine.attention.interface import ATTENTION_NAME, Layout
from server.engine.model.frozen import FrozenModel
from tests.support import tiny_module

ROWS = ["the cat sat on the mat and looked at the dog", "a small house by the sea is what we want", "return x"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]


def sentencepiece_tokenizer(*, legacy: bool = False) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: ▁ for a space, single bytes for what has no word, and a space before every text.

    Args:
        legacy: the space is put there by a normalizer, even before a space; else only where there is none.
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(
        ROWS * 50, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>"],
    )


class ScriptedModel(FrozenModel):
    """A tiny llama whose every request is answered with the same tokens; one request at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype = torch.float32) -> None:
        module = tiny_module(dtype=dtype, attention=ATTENTION_NAME)
        module.resize_token_embeddings(max(len(tokenizer), module.config.vocab_size))
        super().__init__(module, tokenizer, name="scripted", max_model_len=192)
        self.script: Sequence[int] = ()
        """What it says; the end token after it."""
        self._said = 0

    def ids(self, *tokens: str) -> list[int]:
        """Token ids by their names."""
        found = [self.text.backend.token_to_id(token) for token in tokens]
        return [token_id for token_id in found if token_id is not None]

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        logits = super().forward(inputs_embeds, position_ids, layout, keep)
        if len(position_ids) > 1:  # not a token that was said
            self._said = 0
        if len(logits):
            rest = self.script[self._said :]
            logits[-1, rest[0] if rest else self.text.end_token_id] = 1e4
            self._said += 1
        return logits
