"""Initial values: those of real tokens, because random vectors lie off the model's manifold.

Lester et al. 2021, section 3.2: random initialisation is worst on small models; class labels and sampled vocabulary are
best. The vocabulary is sampled from its most common tokens, which are the first of a BPE vocabulary. Another task's
soft prompt as the start is SPoT (Vu et al. 2022). Prefix tuning starts at the keys and values of such tokens.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from server.engine.model.frozen import FrozenModel
from server.errors import InvalidSoftPrompt, InvalidTrainingData
from server.soft_prompts.formats import load_soft_prompts
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.config import TrainingConfig
from server.train.forward import key_values_of
from server.train.methods import KeyValues

log = logging.getLogger(__name__)

COMMON_TOKENS = 5000


def values_of_tokens(
    model: FrozenModel, token_ids: Sequence[int], random_seed: int | None = None, *, is_kv_prefix: bool
) -> torch.Tensor | KeyValues:
    """Input embeddings, or keys and values, of real tokens; with a seed: random embeddings of the same scale."""
    if is_kv_prefix:
        return tuple((key.float().cpu(), value.float().cpu()) for key, value in key_values_of(model, token_ids))
    with torch.no_grad():
        embeddings = model.embed(torch.tensor(token_ids, device=model.device)).float().cpu().clone()
    if random_seed is None:
        return embeddings
    return torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(random_seed)) * embeddings.std()


def load_start(model: FrozenModel, config: TrainingConfig, directory: Path | None) -> SoftPrompt:
    """The soft prompt that training begins with.

    Raises InvalidTrainingData if it cannot be read, or is not of the kind and length of what is to be learned.
    """
    assert directory is not None, "the reader of the configuration has requested it"
    try:
        found = load_soft_prompts(directory, model.spec, config.num_virtual_tokens)[0]
    except InvalidSoftPrompt as exc:
        raise InvalidTrainingData(
            f"{config.init_from} cannot be the start: {exc.message}",
            remedy="Name the PEFT directory of a soft prompt for this model.",
        ) from exc
    for note in found.notes:
        log.warning("%s: %s", config.init_from, note)
    check_start(config, found)
    return found


def initial_token_ids(model: FrozenModel, config: TrainingConfig, labels: Sequence[str] | None) -> list[int]:
    """Real tokens for all virtual ones: the labels' or those of a text, filled up with sampled common tokens.

    With `init` random only their number and scale count.
    """
    ids: list[int] = []
    if config.init == "labels" or (config.init == "auto" and labels):
        ids = [token for label in labels or () for token in model.tokenizer.encode(label, add_special_tokens=False)]
    elif config.init == "text":
        ids = model.tokenizer.encode(config.init_text or "", add_special_tokens=False)
    model.text.check_tokens(ids, "The text that the virtual tokens begin as")
    generator = torch.Generator().manual_seed(config.seed)
    special = set(model.tokenizer.all_special_ids)
    common = torch.tensor([i for i in range(min(COMMON_TOKENS, model.spec.vocab_size)) if i not in special])
    sampled: list[int] = common[torch.randint(len(common), (config.num_virtual_tokens,), generator=generator)].tolist()
    return (ids + sampled)[: config.num_virtual_tokens]


def check_start(config: TrainingConfig, found: SoftPrompt) -> None:
    """Raise InvalidTrainingData for a start of another kind or length than what is to be learned."""
    is_alike = found.is_kv_prefix == (config.method == "prefix_tuning")
    if found.num_virtual_tokens != config.num_virtual_tokens or not is_alike:
        raise InvalidTrainingData(
            f"{config.init_from} holds {found.num_virtual_tokens} virtual tokens of {found.peft_type}; "
            f"{config.num_virtual_tokens} of {config.method} are to be trained.",
            remedy="Start from one of the same kind and length.",
        )
