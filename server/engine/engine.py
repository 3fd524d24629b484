"""The engine: one synchronous `step()`, schedule -> run -> commit. It knows nothing of threads or of HTTP."""

from __future__ import annotations

import numpy as np
import torch

from server.core import Delta, FinishReason, GenerationRequest, Token
from server.engine.compiled_attention import CompiledAttention, CompiledRows
from server.engine.decode_graphs import DecodeGraphs
from server.engine.detokenizer import Detokenizer
from server.engine.kv_cache import KVCache
from server.engine.layout import CachedRows, Span
from server.engine.model import FrozenModel
from server.engine.operators import operators_with
from server.engine.prefix_cache import PrefixCache
from server.engine.sampler import Choice, choose_next
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.upload import upload
from server.engine.varlen_rows import VarlenRows, varlen_attention
from server.errors import EmptyInput, GenerationFailed, InputTooLong, NotFinite
from server.soft_prompts.soft_prompt import SoftPrompt

Batch = list[tuple[Sequence, Span]]


class Engine:
    """Continuous batching over one frozen model.

    Attributes:
        model: the frozen model.
        kv_cache: the pool that running sequences own slots of.
        prefixes: computed prefixes of soft prompts.
        scheduler: who waits and who runs.
        steps: batches that were run so far.
        compiled: attends on a CPU, where there is compiled code for it.
        varlen: attends for all of a step at once, where CUDA can.
        graphs: replay steps that only decode, where they were captured.
    """

    def __init__(
        self, model: FrozenModel, kv_cache: KVCache, prefixes: PrefixCache, max_sequences: int, max_batch_tokens: int
    ) -> None:
        """Put the parts together; `server.engine.build` makes them from the settings."""
        self.model = model
        self.kv_cache = kv_cache
        self.prefixes = prefixes
        self.scheduler = Scheduler(model.spec, kv_cache, prefixes, max_sequences, max_batch_tokens)
        self._special_ids = frozenset(model.tokenizer.all_special_ids)
        self._operators = operators_with(model.kernels)
        self.compiled = CompiledAttention.over(kv_cache, model.attention_rules, model.kernels)
        self.varlen = varlen_attention(model.spec, model.attention_rules)
        self.graphs: DecodeGraphs | None = None
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """True while anybody waits or runs."""
        return bool(self.scheduler.running or len(self.scheduler.waiting))

    def check(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        """Refuse what can never run; touches nothing, so any thread may call it.

        Raises:
            EmptyInput: no input token.
            InputTooLong: virtual tokens + input + new tokens exceed the context; names the lengths.
        """
        virtual = 0 if soft_prompt is None else soft_prompt.num_virtual_tokens
        inputs, new = len(request.input_ids), request.sampling.max_new_tokens
        if not inputs:
            raise EmptyInput("The input holds no token.")
        limit = self.model.spec.max_model_len
        if virtual + inputs + new > limit:
            raise InputTooLong(
                f"The request needs {virtual + inputs + new} positions ({virtual} virtual tokens, {inputs} input "
                f"tokens, {new} new tokens); the context holds {limit}."
            )

    def add(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        """Accept a checked request; it ends with exactly one Delta that has a finish_reason."""
        detokenizer = Detokenizer(self.model.tokenizer, request.sampling.stop)
        self.scheduler.add(Sequence(request, soft_prompt, detokenizer))

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free what it holds; None if it has ended already."""
        sequence = self.scheduler.abort(request_id)
        return None if sequence is None else Delta(request_id, None, FinishReason.ABORTED, sequence.usage)

    def fail_all(self, message: str) -> list[Delta]:
        """End everybody with an error: after a step that raised, no slot's content can be trusted."""
        deltas = [self._fail(sequence, GenerationFailed(message)) for sequence in list(self.scheduler.running)]
        for sequence in list(self.scheduler.waiting):
            self.scheduler.abort(sequence.request_id)
            error = GenerationFailed(message)
            deltas.append(Delta(sequence.request_id, None, FinishReason.FAILED, sequence.usage, error))
        return deltas

    def step(self) -> list[Delta]:
        """Run one batch and answer what it added to each request."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        self.steps += 1
        return self._commit(batch, self._run(batch))

    @torch.inference_mode()
    def _run(self, batch: Batch) -> list[Choice]:
        """Forward the batch and choose a token for every sequence whose known tokens are now all computed."""
        if self.graphs is not None and self.graphs.takes(len(batch)) and all(_decodes(*row) for row in batch):
            logits = self.graphs.run(
                [sequence.token_at(span.start) for sequence, span in batch],
                [span.start for _, span in batch],
                [span.slot.start for _, span in batch],
            )
        else:
            logits = self._forward(batch)
        sampled = [sequence for sequence, span in batch if span.end == sequence.num_known]
        return choose_next(logits, sampled, self.model.eos_token_ids, self._operators) if sampled else []

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Logits `[sampled, vocab_size]` of any batch."""
        layout = self._lay_out([span for _, span in batch])
        ids, virtual = _tokens(batch)
        last_rows = np.cumsum([span.count for _, span in batch]) - 1
        keep = last_rows[[span.end == sequence.num_known for sequence, span in batch]]
        token_ids, kept = upload([np.array(ids), keep], self.model.device)
        embeddings = self.model.embed(token_ids)
        for first, rows in virtual:
            embeddings[first : first + len(rows)] = rows.to(self.model.device, self.model.dtype)
        return self.model.forward(embeddings, layout.position_ids, layout, kept)

    def _lay_out(self, spans: list[Span]) -> VarlenRows | CompiledRows | CachedRows:
        if self.varlen is not None:
            return VarlenRows.of(self.kv_cache, self.varlen, spans)
        if self.compiled is not None:
            return CompiledRows(self.compiled, spans)
        return CachedRows(self.kv_cache, spans)

    def _commit(self, batch: Batch, choices: list[Choice]) -> list[Delta]:
        """Take the step's results over into the sequences; those that end are taken out."""
        remaining = iter(choices)
        deltas = []
        for sequence, span in batch:
            samples = span.end == sequence.num_known
            sequence.num_computed = span.end
            finite = self.scheduler.keep_prefix(sequence)
            choice = next(remaining) if samples else None
            if not finite or (choice is not None and choice.token_id is None):
                error = NotFinite("The model's output is not finite for this soft prompt and input.")
                deltas.append(self._fail(sequence, error))
            elif choice is not None:
                sequence.num_finite = span.end
                deltas.append(self._append(sequence, choice))
        return deltas

    def _append(self, sequence: Sequence, choice: Choice) -> Delta:
        token_id = choice.token_id
        assert token_id is not None, "a choice that is not finite has been dealt with"
        sequence.append(token_id)
        params = sequence.sampling
        text, stopped = sequence.detokenizer.push(token_id)
        reason = None
        if token_id in self.model.eos_token_ids and not params.ignore_eos:
            reason = FinishReason.EOS_TOKEN
        elif stopped:
            reason = FinishReason.STOP_SEQUENCE
        elif len(sequence.output_ids) >= params.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and not stopped:
            text += sequence.detokenizer.flush()
        token = self._token(token_id, text, choice.logprob)
        if reason is None:
            return Delta(sequence.request_id, token)
        self.scheduler.finish(sequence)
        return Delta(sequence.request_id, token, reason, sequence.usage)

    def _token(self, token_id: int, text: str, logprob: float | None) -> Token:
        """A special token shows its own name, unless it carries text that was held back until it came."""
        if token_id in self._special_ids and not text:
            return Token(token_id, str(self.model.tokenizer.convert_ids_to_tokens(token_id)), logprob, special=True)
        return Token(token_id, text, logprob)

    def _fail(self, sequence: Sequence, error: Exception) -> Delta:
        self.scheduler.finish(sequence, scrub=True)
        return Delta(sequence.request_id, None, FinishReason.FAILED, sequence.usage, error)


def _decodes(sequence: Sequence, span: Span) -> bool:
    """Whether a share of a step is one token that asks for the next: the last known one, so no virtual token."""
    return span.count == 1 and span.end == sequence.num_known


def _tokens(batch: Batch) -> tuple[list[int], list[tuple[int, torch.Tensor]]]:
    """Token ids of a step's flat row, and the virtual tokens in it, by their first row; their ids mean nothing."""
    ids: list[int] = []
    virtual: list[tuple[int, torch.Tensor]] = []
    for sequence, span in batch:
        n = sequence.num_virtual_tokens
        if span.start < n:
            assert sequence.soft_prompt is not None, "only a soft prompt has virtual tokens"
            rows = sequence.soft_prompt.tensor[span.start : min(span.end, n)]
            virtual.append((len(ids), rows))
            ids += [0] * len(rows)
        ids += [sequence.token_at(position) for position in range(max(span.start, n), span.end)]
    return ids, virtual
