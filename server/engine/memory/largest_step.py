"""Measures what steps take on a CUDA device: runs the largest one before the rest of the memory is divided.

The largest step has as many tokens as a step may have, at the end of the longest context. Log-probabilities are
computed for all tokens, and as many rows as the sampler handles at once are sampled with every sampling rule switched
on. Its rows all write to one slot, which nobody reads afterwards.
"""

import copy
from collections.abc import Callable

import torch

from server.contracts import GenerationRequest, SamplingParams
from server.engine.attention.cached_rows import Span
from server.engine.engine import Engine
from server.engine.fast.decode_graphs import buckets
from server.engine.memory.kv_cache import KVCache, bytes_of
from server.engine.memory.plan import MiB, Steps
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.memory.slots import Slot
from server.engine.model.frozen import FrozenModel
from server.engine.out_of_memory import release_unused
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import rows_at_once
from server.engine.scheduling.sequence import Sequence
from server.engine.text.detokenizer import Detokenizer
from server.errors import InsufficientMemory

TOP = 20
"""Likelier tokens that are reported beside each."""

ALL_RULES = SamplingParams(
    temperature=1.0,
    top_k=1000,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logprobs=True,
    top_logprobs=TOP,
)

WORKSPACES = 64 * MiB
"""What cuBLAS takes for the stream that graphs are captured on."""


def measure_steps(model: FrozenModel, max_sequences: int, max_batch_tokens: int, longest_prefix: int) -> Steps | None:
    """What steps take beside weights and KV cache; None on a CPU, whose allocator does not count it.

    Raises:
        InsufficientMemory: the device has no memory for the largest step; says what would help.
    """
    if model.device.type != "cuda":
        return None
    try:
        steps = _measure(model, max_sequences, max_batch_tokens, longest_prefix)
    except torch.OutOfMemoryError as exc:
        raise InsufficientMemory(
            f"{model.device} has no memory for a step of {max_batch_tokens:,} tokens and one context of "
            f"{model.spec.max_model_len:,} positions beside the model.",
            remedy="Lower PRELUDE_MAX_BATCH_TOKENS or PRELUDE_MAX_MODEL_LEN, or free memory on the device.",
        ) from exc
    release_unused()
    return steps


def _measure(model: FrozenModel, max_sequences: int, max_batch_tokens: int, longest_prefix: int) -> Steps:
    kv_cache = KVCache(model.spec, num_slabs=1, max_sequences=1)
    engine = Engine(model, kv_cache, PrefixCache(0), max_sequences, max_batch_tokens)
    running = engine.scheduler.max_running
    slot = kv_cache.allocate(model.spec.max_model_len)
    assert slot is not None, "a slab holds the longest context"
    largest = peak(model.device, lambda: engine.run(largest_batch(model, slot, running, max_batch_tokens)))
    bucket = buckets(running)[-1]
    decoding = peak(model.device, lambda: engine.run(decodes(model, slot, bucket, SamplingParams())))
    logits = bucket * model.spec.vocab_size * model.dtype.itemsize  # output logits of all smaller buckets together
    prefix = bytes_of(model.spec, longest_prefix)
    return Steps(largest, decoding + logits + WORKSPACES, prefix)


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Peak bytes that some work allocates temporarily on a CUDA device."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


def largest_batch(model: FrozenModel, slot: Slot, running: int, tokens: int) -> Batch:
    """A batch of `tokens` tokens, at least one for each running sequence, that computes logits for every token."""
    num_decodes = running - 1 if tokens > running else running
    batch = decodes(model, slot, num_decodes, ALL_RULES)
    whole, length = _sequence(model, ALL_RULES), model.spec.max_model_len
    for taken in range(0, tokens - num_decodes, length):
        count = min(length, tokens - num_decodes - taken)
        batch.append((copy.copy(whole), Span(slot, length - count, count)))
    drawing, _ = batch[-1]
    missing = rows_at_once(model.device, model.spec.vocab_size) - len(batch)
    drawing.siblings = [copy.copy(drawing) for _ in range(missing)]
    return batch


def decodes(model: FrozenModel, slot: Slot, count: int, rules: SamplingParams) -> Batch:
    """A number of sequences that each compute the last position of the longest context."""
    if not count:
        return []
    sequence = _sequence(model, rules)
    span = Span(slot, model.spec.max_model_len - 1, 1)
    return [(copy.copy(sequence), span) for _ in range(count)]


def _sequence(model: FrozenModel, rules: SamplingParams) -> Sequence:
    """One whose input fills the longest context, with as many different tokens as there can be."""
    length, vocabulary = model.spec.max_model_len, model.spec.vocab_size
    ids = tuple(i % vocabulary for i in range(length))
    request = GenerationRequest("largest", ids, rules, input_logprobs=rules.logprobs, input_top_logprobs=TOP)
    return Sequence(request, None, Detokenizer(model.text.tokens, rules, continues_text=True))
