"""CUDA graphs for steps in which every sequence decodes one token: one launch instead of hundreds.

A graph repeats exactly the captured work on the same memory. There is one graph for each of a few batch sizes
(buckets), and a batch is padded to the next bucket. Each padding row is token 0 of a sequence of length one whose slot
is the cache's `scratch` position: all padding rows write the same values there, and no other sequence reads them.

The device computes all inputs of a step from three numbers per row, which the host copies into a buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from server.engine.attention.varlen_rows import Part, VarlenAttention, VarlenRows
from server.engine.memory.kv_cache import KVCache
from server.engine.model.frozen import FrozenModel
from server.engine.to_device import on_host

log = logging.getLogger(__name__)

LARGEST_BUCKET = 512
"""Larger batches need no graph: they keep the device busy during launches, and their logits would take gigabytes."""

Forward = Callable[[], torch.Tensor]

GraphCapture = Callable[[Forward], Forward]
"""Captures work on fixed memory and returns a function that replays it; each call overwrites the previous result.

The returned function keeps the captured one alive: the graph reads tensors that it references, whose memory would
otherwise be reused."""


def buckets(max_sequences: int) -> list[int]:
    """Batch sizes to capture: powers of two, and the largest possible batch."""
    largest = min(max_sequences, LARGEST_BUCKET)
    return [1 << power for power in range((largest - 1).bit_length())] + [largest]


class DecodeGraphs:
    """The model's forward over decoding rows, captured for each of `buckets`: batch sizes in ascending order."""

    def __init__(
        self,
        model: FrozenModel,
        kv_cache: KVCache,
        attention: VarlenAttention,
        max_sequences: int,
        record: GraphCapture,
    ) -> None:
        """Capture all buckets, largest first, so that the smaller graphs fit into the memory of the largest."""
        self.buckets = buckets(max_sequences)
        self._model, self._kv_cache, self._attention = model, kv_cache, attention
        self._longest_slot = kv_cache.allocator.slab_length
        device = kv_cache.states.device
        self._inputs = torch.zeros(3 * self.buckets[-1], dtype=torch.long, device=device)
        self._replays: dict[int, Forward] = {}
        for bucket in tqdm(
            reversed(self.buckets), "capturing CUDA graphs", total=len(self.buckets), leave=False, disable=None
        ):
            self._fill(bucket, [], [], [])
            self._replays[bucket] = record(self._forward(bucket))

    def takes(self, rows: int) -> bool:
        """Whether a batch of this size fits into the largest bucket."""
        return rows <= self.buckets[-1]

    def run(self, token_ids: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
        """Run one step in inference mode; returns logits `[rows, vocab_size]`, which the next step overwrites.

        Args:
            token_ids: `[rows]`.
            positions: `[rows]`, each token's position in its own sequence.
            starts: `[rows]`, the start of each sequence's slot in the pool.
        """
        rows = len(token_ids)
        bucket = next(bucket for bucket in self.buckets if bucket >= rows)
        self._fill(bucket, token_ids, positions, starts)
        return self._replays[bucket]()[:rows]

    def _fill(self, bucket: int, token_ids: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> None:
        """Write a batch and its padding rows to the buffer; the host does not wait."""
        host = np.zeros((3, bucket), dtype=np.int64)
        host[2] = self._kv_cache.scratch
        host[:, : len(token_ids)] = (token_ids, positions, starts)
        self._inputs[: host.size].copy_(on_host(host.reshape(-1), self._inputs.device), non_blocking=True)

    def _forward(self, bucket: int) -> Forward:
        """The forward of a bucket, which reads only device memory."""
        device = self._inputs.device
        token_ids, position_ids, starts = self._inputs[: 3 * bucket].view(3, bucket)
        rows = torch.arange(bucket, device=device)
        first_rows = torch.arange(bucket + 1, device=device, dtype=torch.int32)

        def forward() -> torch.Tensor:
            part = Part(
                torch.nn.functional.pad(starts, (0, 1)).int(),
                (position_ids + 1).int(),
                first_rows,
                max_q=1,
                max_k=self._longest_slot,
            )
            layout = VarlenRows(self._kv_cache, self._attention, position_ids, position_ids + starts, [(bucket, part)])
            return self._model.forward(self._model.embed(token_ids), position_ids, layout, rows)

        return forward


class CudaRecorder:
    """Captures with torch's CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        """Prepare for one device. All graphs share one stream, so libraries allocate their workspaces once."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.graph.default_capture_stream = self._stream

    def __call__(self, forward: Forward) -> Forward:
        """See `GraphCapture`."""
        # A failed capture leaves its own stream as the current one; this block restores the previous stream.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            return self._record(forward)

    def _record(self, forward: Forward) -> Forward:
        # A first run before the capture: libraries choose algorithms and allocate workspaces, which cannot be captured.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward()
            # A capture that fails leaves the allocator capturing for good, so one that would fail is not begun.
            with _waits_as_errors():
                forward()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        replay.reads = forward  # type: ignore[attr-defined]
        return replay


@contextmanager
def _waits_as_errors() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device, which a capture cannot hold."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@torch.inference_mode()
def capture(
    model: FrozenModel,
    kv_cache: KVCache,
    attention: VarlenAttention | None,
    max_sequences: int,
    record: GraphCapture | None = None,
) -> DecodeGraphs | None:
    """Capture the graphs of a model; None if `attention` is None (as without CUDA) or the capture fails."""
    if attention is None:
        return None
    try:
        graphs = DecodeGraphs(model, kv_cache, attention, max_sequences, record or CudaRecorder(model.device))
    except Exception as exc:  # noqa: BLE001 - a model that cannot be captured still runs eagerly
        reason = next(iter(str(exc).splitlines()), "") or type(exc).__name__
        log.warning("decoding runs without CUDA graphs, because they cannot be captured: %s", reason)
        return None
    log.info("captured CUDA graphs for decoding %s sequences", ", ".join(map(str, graphs.buckets)))
    return graphs
