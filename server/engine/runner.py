"""Runs one batch through the model: its layout, the forward, the logits, and sampling."""

from collections.abc import Callable

import numpy as np
import torch

from server.engine.attention.cached_rows import CachedRows, Span
from server.engine.attention.compiled_rows import CompiledAttention, CompiledRows
from server.engine.attention.recurrent import RecurrentRows, ServingRows
from server.engine.attention.varlen_rows import VarlenRows, varlen_attention
from server.engine.fast.decode_graphs import DecodeGraphs
from server.engine.fast.operators import operators_with
from server.engine.fast.row_buckets import bucket
from server.engine.memory.kv_cache import KVCache
from server.engine.model.frozen import FrozenModel
from server.engine.sampling.logit_rows import Batch, LogitRows, tokens_of
from server.engine.sampling.sampler import NextToken, begin_choosing
from server.engine.to_device import Download, send, upload


class Runner:
    """Runs each batch by the fastest method that the device supports."""

    def __init__(self, model: FrozenModel, kv_cache: KVCache) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._operators = operators_with(model.kernels)
        self.compiled = CompiledAttention.over(kv_cache, model.attention_rules, model.kernels)
        self._pads = self.compiled is not None and kv_cache.recurrent is None  # to numbers of rows that products know
        self.varlen = varlen_attention(model.spec, model.attention_rules)
        self.on_launch: Callable[[], None] = lambda: None
        """Called when the inputs of a step are ready, right before the model runs."""
        self.graphs: DecodeGraphs | None = None  # replay steps with decodes only, once they are captured

    @torch.inference_mode()
    def run(self, batch: Batch, before_wait: Callable[[Download], None]) -> list[NextToken]:
        """Forward the batch, and sample a token for each sequence whose known tokens are now all computed.

        After the forward was launched, `before_wait` is called with the download of all results.
        """
        rows = LogitRows.of(batch)
        if self.graphs is not None and self.graphs.takes(len(batch)) and rows.only_decodes:
            self.on_launch()
            logits = self.graphs.run(
                [sequence.token_at(span.start) for sequence, span in batch],
                [span.start for _, span in batch],
                [span.slot.start for _, span in batch],
            )
        else:
            logits = self.forward(batch, rows.kept)
        download = Download()
        give_scores = rows.score(logits, download, self._operators)
        choices: Callable[[], list[NextToken]] = list
        if rows.drawing:
            eos = self._model.eos_token_ids
            choices = begin_choosing(logits, rows.drawing, eos, download, self._operators, rows.next_rows)
        before_wait(download)
        give_scores()  # the only point of a step at which the host waits for the device
        return choices()

    def forward(self, batch: Batch, kept_rows: np.ndarray) -> torch.Tensor:
        """Logits `[kept_rows, vocab_size]` of any batch."""
        ids, virtual = tokens_of(batch)
        if not self._pads:
            return self._forward([span for _, span in batch], ids, virtual, kept_rows, 0)
        rows, num_kept = bucket(len(ids)), len(kept_rows)
        padding, num_computed = rows - len(ids), bucket(num_kept) if num_kept else 0
        spans = [span for _, span in batch]
        if num_computed < rows:
            kept = np.pad(kept_rows, (0, num_computed - num_kept))
            return self._forward(spans, ids, virtual, kept, padding)[:num_kept]
        logits = self._forward(spans, ids, virtual, np.arange(rows), padding)
        return logits[:num_kept] if num_kept == len(ids) else logits[torch.from_numpy(kept_rows)]

    def _forward(
        self,
        spans: list[Span],
        ids: list[int],
        virtual: list[tuple[int, torch.Tensor]],
        kept_rows: np.ndarray,
        padding: int,
    ) -> torch.Tensor:
        layout = self._lay_out(spans, padding)
        token_ids, kept = upload([np.array(ids + [0] * padding), kept_rows], self._model.device)
        embeddings = self._model.embed(token_ids)
        for first, rows in virtual:
            embeddings[first : first + len(rows)] = send(rows, self._model.device, self._model.dtype)
        self.on_launch()
        return self._model.forward(embeddings, layout.position_ids, layout, kept)

    def _lay_out(self, spans: list[Span], padding: int) -> ServingRows:
        layout: ServingRows
        if self.varlen is not None:
            layout = VarlenRows.of(self._kv_cache, self.varlen, spans)
        elif self.compiled is not None:
            layout = CompiledRows(self.compiled, spans, padding)
        else:
            layout = CachedRows(self._kv_cache, spans)
        return layout if self._kv_cache.recurrent is None else RecurrentRows(layout, self._kv_cache.recurrent, spans)
