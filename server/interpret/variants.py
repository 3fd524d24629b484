"""Changed soft prompts for experiments; each is evaluated like any other soft prompt.

For input embeddings: nearest tokens, the start, random tokens, directions alone, another order, fewer dimensions of the
change, fewer bits. For a KV prefix: random tokens, learned keys with the start's values and the reverse, layers reset
to the start. Attention does not depend on the order of keys and values, so they are not shuffled.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from server.engine.model.frozen import FrozenModel
from server.interpret.p_values import unit
from server.interpret.vocabulary import Vocabulary
from server.soft_prompts.soft_prompt import SoftPrompt
from server.train.config import TrainingConfig
from server.train.initial import initial_token_ids, values_of_tokens
from server.train.methods import join_key_values

RANKS = (1, 2, 4, 8)
BITS = (8, 4, 2)
NEAREST, RANDOM, START = "nearest tokens", "random tokens", "start"
SEED = 1
"""Not 0, with which most soft prompts begin."""


@dataclass(frozen=True)
class Variant:
    """A changed soft prompt under a name."""

    name: str
    soft_prompt: SoftPrompt
    removed: int | None = None
    """The virtual token that was replaced, in leave one out."""


def changed(soft_prompt: SoftPrompt, tensor: torch.Tensor) -> SoftPrompt:
    """The same soft prompt with another tensor; without tokens to generate, because only given texts are scored."""
    generation = soft_prompt.manifest.generation.model_copy(update={"max_new_tokens": 1, "min_new_tokens": None})
    manifest = soft_prompt.manifest.model_copy(update={"generation": generation})
    return SoftPrompt(soft_prompt.peft_type, tensor.to(soft_prompt.tensor.dtype).contiguous(), manifest)


def ladder(
    model: FrozenModel, vocabulary: Vocabulary, soft_prompt: SoftPrompt, start: torch.Tensor | None
) -> list[Variant]:
    """The variants of the discretisation gap, those that need the start only where it is known."""
    learned = soft_prompt.tensor.detach().float().cpu()
    if soft_prompt.is_kv_prefix:
        found = list(_of_prefix(model, soft_prompt, learned, start))
    else:
        found = list(_of_embeddings(vocabulary, learned, start))
    tokens = random_tokens(model, soft_prompt)
    found.insert(1 if not soft_prompt.is_kv_prefix else 0, (RANDOM, tokens))
    found += [(f"rank {rank} of the change", _of_rank(learned, start, rank)) for rank in _ranks(learned, start)]
    found += [(f"{bits} bits", quantised(learned, bits)) for bits in BITS]
    return [Variant(name, changed(soft_prompt, tensor)) for name, tensor in found]


def removals(soft_prompt: SoftPrompt, start: torch.Tensor | None, model: FrozenModel) -> tuple[str, list[Variant]]:
    """Leave one out, and what replaces the virtual token: its start, else the mean embedding or a value of zero."""
    learned = soft_prompt.tensor.detach().float().cpu()
    if start is not None:
        how, filler = "its start", start
    elif soft_prompt.is_kv_prefix:
        how, filler = "a value of zero", _without_values(learned, model)
    else:
        how, filler = "the mean virtual token", learned.mean(0, keepdim=True).expand_as(learned)
    found = []
    for index in range(len(learned)):
        tensor = learned.clone()
        tensor[index] = filler[index]
        found.append(Variant(f"without {index}", changed(soft_prompt, tensor), removed=index))
    return how, found


def random_tokens(model: FrozenModel, soft_prompt: SoftPrompt) -> torch.Tensor:
    """Common vocabulary tokens, as many and of the same kind as the soft prompt."""
    config = TrainingConfig(num_virtual_tokens=soft_prompt.num_virtual_tokens, init="vocab", seed=SEED)
    ids = initial_token_ids(model, config, None)
    values = values_of_tokens(model, ids, is_kv_prefix=soft_prompt.is_kv_prefix)
    return values if isinstance(values, torch.Tensor) else join_key_values(values)


def quantised(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row rounded to 2^bits − 1 levels, symmetric around 0."""
    levels = 2 ** (bits - 1) - 1
    scale: torch.Tensor = tensor.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny) / levels
    rounded: torch.Tensor = (tensor / scale).round()
    return rounded * scale


def _of_embeddings(
    vocabulary: Vocabulary, learned: torch.Tensor, start: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    near = vocabulary.nearest(vocabulary.centred(learned.to(vocabulary.mean)), 1).rows[:, 0]
    yield NEAREST, vocabulary.embed(vocabulary.token_ids[near]).float().cpu()
    if start is not None:
        yield START, start
    yield "direction only", unit(learned) * float(vocabulary.norms.median())
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(SEED))
    yield "shuffled", learned[order]


def _of_prefix(
    model: FrozenModel, soft_prompt: SoftPrompt, learned: torch.Tensor, start: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if start is None:
        return
    spec = model.spec
    shape = (len(learned), spec.num_kv_layers, 2, spec.num_key_value_heads * spec.head_dim)
    mine, before = learned.view(shape), start.view(shape)
    yield START, start
    for name, part in (("learned keys, values of the start", 1), ("learned values, keys of the start", 0)):
        tensor = mine.clone()
        tensor[:, :, part] = before[:, :, part]
        yield name, tensor.flatten(1)
    thirds = [spec.num_kv_layers * part // 3 for part in range(4)]
    for first, end in itertools.pairwise(thirds):
        if first < end:
            tensor = mine.clone()
            tensor[:, first:end] = before[:, first:end]
            yield f"layers {first} to {end - 1} reset", tensor.flatten(1)


def _ranks(learned: torch.Tensor, start: torch.Tensor | None) -> list[int]:
    return [] if start is None else [rank for rank in RANKS if rank < min(learned.shape)]


def _of_rank(learned: torch.Tensor, start: torch.Tensor | None, rank: int) -> torch.Tensor:
    """The start plus the best approximation of the change by a matrix of this rank."""
    assert start is not None, "there are no ranks without a start"
    left, singular, right = torch.linalg.svd(learned - start, full_matrices=False)
    nearest: torch.Tensor = (left[:, :rank] * singular[:rank]) @ right[:rank]
    return start + nearest


def _without_values(learned: torch.Tensor, model: FrozenModel) -> torch.Tensor:
    spec = model.spec
    tensor = learned.clone().view(len(learned), spec.num_kv_layers, 2, -1)
    tensor[:, :, 1] = 0
    return tensor.flatten(1)
