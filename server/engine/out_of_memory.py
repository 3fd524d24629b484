"""Reruns a step that ran out of device memory, with fewer tokens to prefill and the same decodes.

A step's memory grows with its tokens, and a decode adds only one. Decodes therefore stay, and the number of prefill
tokens is halved. If memory still does not suffice, the sequence with the largest prefill fails.
"""

import contextlib
import gc
import logging
from collections.abc import Callable

import torch

from server.contracts import Delta
from server.engine.attention.cached_rows import Span
from server.engine.sampling.logit_rows import Batch
from server.engine.scheduling.sequence import Sequence
from server.errors import GenerationFailed

log = logging.getLogger(__name__)


def run_with_less(
    batch: Batch,
    run: Callable[[Batch], list[Delta]],
    fail: Callable[[Sequence, Exception], Delta],
    no_memory: torch.OutOfMemoryError,
) -> list[Delta]:
    """Rerun a step that ran out of device memory; at most its largest prefill fails.

    Args:
        batch: the step.
        run: runs a batch and applies its results.
        fail: ends a sequence with an error.
        no_memory: the exception of the step; raised if even the decodes alone do not fit.
    """
    log.warning("the device has no memory for a step; it runs again with half as many tokens to prefill")
    if (smaller := halved(batch)) is not None:
        release_unused()
        with contextlib.suppress(torch.OutOfMemoryError):
            return run(smaller)
    release_unused()
    largest, span = max(batch, key=lambda share: share[1].count)
    if span.count == 1:
        raise no_memory
    log.error("the device has no memory for %d tokens of input; their request fails", largest.num_pending)
    error = GenerationFailed("The device has no memory for this request.", remedy="Retry later, or shorten it.")
    failed = [fail(largest, error)]
    decodes = [(sequence, span) for sequence, span in batch if span.count == 1 and sequence.slot is not None]
    return failed + (run(decodes) if decodes else [])


def halved(batch: Batch) -> Batch | None:
    """The batch with half its prefill tokens, without the last ones; None if there is nothing to halve."""
    budget = sum(span.count for _, span in batch if span.count > 1) // 2
    if not budget:
        return None
    smaller: Batch = []
    for sequence, span in batch:
        if span.count == 1:
            smaller.append((sequence, span))
        elif budget:
            count = min(span.count, budget)
            smaller.append((sequence, Span(span.slot, span.start, count)))
            budget -= count
    return smaller


def release_unused() -> None:
    """Free device memory that is still referenced by Python's garbage or cached by the allocator."""
    gc.collect()
    torch.cuda.empty_cache()  # no effect without CUDA
