"""What a soft prompt that PEFT loads answers, by definition: the model's own forward over virtual tokens and text.

PEFT makes the virtual tokens, or keys and values, of its files. Its own forward and `generate` are not asked: with
transformers 5.24, PEFT 0.21.2 hands a KV prefix over under a name that is ignored beside `generate`'s own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from tests.support import EOS


@torch.inference_mode()
def peft_logits(peft_model: PeftModel, ids: Sequence[int], task: int | None = None) -> torch.Tensor:
    """Logits `[tokens, vocab_size]` of an input after the soft prompt; `task` is the row of one for several tasks."""
    module: Any = peft_model.get_base_model()
    prompt: Any = peft_model.get_prompt(batch_size=1, task_ids=None if task is None else torch.tensor([task]))
    tokens = torch.tensor([ids])
    if isinstance(prompt, torch.Tensor):
        text = module.get_input_embeddings()(tokens)
        logits: torch.Tensor = module(inputs_embeds=torch.cat([prompt.to(text.dtype), text], dim=1)).logits
    else:
        name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
        logits = module(input_ids=tokens, **{name: prompt}).logits
    return logits[0, -len(ids) :]


def peft_greedy(
    peft_model: PeftModel, ids: Sequence[int], most: int, task: int | None = None, guess: Sequence[int] = ()
) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens after an input and their logits; the token that ends the answer is included.

    A guess saves forwards as far as it is right: one forward checks all of its tokens.
    """
    tokens: list[int] = []
    rows: list[torch.Tensor] = []
    guessed = list(guess[: most - 1])
    while len(tokens) < most and EOS not in tokens:
        for row in peft_logits(peft_model, [*ids, *tokens, *guessed], task)[-1 - len(guessed) :]:
            rows.append(row)
            tokens.append(int(row.argmax()))
            if EOS in tokens or tokens != list(guess[: len(tokens)]):
                break
        guessed = []
    return tokens, torch.stack(rows)
