"""The engine: one synchronous `step()`, schedule -> run -> commit. It is independent of threads and HTTP."""

import logging
import math
from dataclasses import replace
from functools import partial

import torch

from server.contracts import Delta, FinishReason, GenerationRequest, Grammar, SamplingParams, Token
from server.engine.attention.cached_rows import Span
from server.engine.check_request import check_request
from server.engine.grammars.compiled import Compiled, Grammars
from server.engine.grammars.walks import Walk, Walks
from server.engine.memory.kv_cache import KVCache
from server.engine.memory.prefix_cache import PrefixCache
from server.engine.model.frozen import FrozenModel
from server.engine.out_of_memory import run_with_less
from server.engine.runner import Runner
from server.engine.sampling.logit_rows import Batch
from server.engine.sampling.sampler import NextToken
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.text.detokenizer import Detokenizer
from server.errors import GenerationFailed, NotFinite
from server.soft_prompts.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one frozen model; `steps` is the number of batches so far."""

    def __init__(
        self,
        model: FrozenModel,
        kv_cache: KVCache,
        prefixes: PrefixCache,
        max_sequences: int,
        max_batch_tokens: int,
        shared_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.prefixes = prefixes
        self.scheduler = Scheduler(model.spec, kv_cache, prefixes, max_sequences, max_batch_tokens, shared_bytes)
        self.grammars = Grammars(model.text.backend, model.spec.vocab_size, model.eos_token_ids)
        self._walks = Walks(self.grammars)
        self._awaiting_grammar: dict[Walk, tuple[Sequence, NextToken]] = {}  # drawn tokens, not accepted yet
        self._unfinished: dict[str, int] = {}  # request id -> choices that have not ended
        self._special_ids = model.text.tokens.special_ids
        self.runner = Runner(model, kv_cache)
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.scheduler.running or len(self.scheduler.waiting) or self._walks.has_work)

    def check_integrity(self) -> None:
        """Assert that nothing is left of ended sequences; called whenever the engine is idle."""
        self.scheduler.check_integrity()
        assert self.has_work or not self._unfinished, "a request has neither ended nor anything to run"
        assert self.has_work or not len(self.scheduler.shared), "a copy is counted that nobody waits with"

    def check(self, request: GenerationRequest, soft_prompt: SoftPrompt | None) -> None:
        """Refuse a request that can never run; raises what `check_request` raises, and is safe from any thread."""
        check_request(request, soft_prompt, self.model)

    def add(self, request: GenerationRequest, soft_prompt: SoftPrompt | None, compiled: Compiled | None = None) -> None:
        """Accept a checked request. Exactly one of its Deltas, the last, has a finish_reason and `is_last`.

        The engine releases `compiled`, the request's grammar; if it is None, the grammar is compiled here. Raises
        InvalidRequest, with nothing accepted, if the grammar cannot be used.
        """
        walks: list[Walk | None] = [None] * request.n
        if (grammar := self.grammar_of(request)) is not None and not request.labels:
            compiled = compiled or self.grammars.compile(grammar)
            walks = [*self._walks.begin(request.request_id, compiled, request.n)]
        first = self._sequence(request, soft_prompt, walk=walks[0])
        if not request.labels:
            others = enumerate(walks[1:], 1)
            first.siblings = [self._sequence(request, soft_prompt, index, walk=walk) for index, walk in others]
        self._unfinished[request.request_id] = request.num_choices
        self.scheduler.add(first)

    def grammar_of(self, request: GenerationRequest) -> Grammar | None:
        """The grammar of a request; it starts with a space if the tokenizer puts one before a target."""
        grammar = request.sampling.grammar
        if grammar is None or request.continues_text or not self.model.text.tokens.puts_space_first:
            return grammar
        return replace(grammar, after_space=True)

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free its resources; returns None if it has already ended."""
        if request_id not in self._unfinished:
            return None
        sequences = self.scheduler.abort(request_id) + self._forget(request_id)
        return Delta(request_id, None, FinishReason.ABORTED, sequences[0].usage)

    def forget(self, request_id: str) -> None:
        """Remove everything that is left of a failed request, at whichever point it failed."""
        self._forget(request_id)
        for sequence in [sequence for sequence in self.scheduler.running if sequence.request_id == request_id]:
            self.scheduler.finish(sequence, scrub=True)
        self.scheduler.abort(request_id)

    def try_out(self) -> None:
        """Generate one token with an otherwise empty engine; raises what a step raises."""
        assert not self.has_work, "an engine is tried out when it is empty"
        self.add(GenerationRequest("try-out", (0,), SamplingParams(max_new_tokens=1, ignore_eos=True)), None)
        while self.has_work:
            self.step()

    def run(self, batch: Batch) -> list[NextToken]:
        """Run a batch, without applying its results; waits for the device."""
        with self.kv_cache.step():
            return self.runner.run(batch, partial(self.scheduler.while_device_works, batch))

    def fail_all(self, message: str) -> list[Delta]:
        """End all requests with an error: after a step that raised, no slot's content can be trusted."""
        for sequence in list(self.scheduler.running):
            self.scheduler.finish(sequence, scrub=True)
        unfinished = list(self._unfinished)
        for request_id in unfinished:
            self.scheduler.abort(request_id)
            self._forget(request_id)
        return [Delta(one, None, FinishReason.FAILED, error=GenerationFailed(message)) for one in unfinished]

    def step(self) -> list[Delta]:
        """Run one batch and return what it added to each request."""
        if failed := self._fail_waiting():
            return failed
        batch = self.scheduler.schedule()
        if not batch:
            self.runner.on_launch()  # nothing is, and what follows may wait
            self.scheduler.arrivals.advance(is_idle=True)
            return self._take_accepted(is_idle=True)
        self.steps += 1
        try:
            deltas = self._run_and_commit(batch)
        except torch.OutOfMemoryError as exc:
            no_memory = exc.with_traceback(None)  # the traceback's frames keep the step's tensors alive
        else:
            return deltas + self._take_accepted(is_idle=False)
        deltas = run_with_less(batch, self._run_and_commit, self._fail, no_memory)
        return deltas + self._take_accepted(is_idle=False)

    def _run_and_commit(self, batch: Batch) -> list[Delta]:
        return self._commit(batch, self.run(batch))

    def _commit(self, batch: Batch, choices: list[NextToken]) -> list[Delta]:
        """Apply the step's results to the sequences, and remove the sequences that end."""
        remaining = iter(choices)
        deltas: list[Delta] = []
        for sequence, span in batch:
            drawn: list[tuple[Sequence, NextToken]] = []
            if sequence.needs_next_after(span):
                drawn.append((sequence, next(remaining)))
                if sequence.siblings:
                    drawn += [(sibling, next(remaining)) for sibling in sequence.siblings]
            if sequence.slot is not None:  # otherwise another choice of its request has failed in this step
                try:
                    deltas += self._take_over(sequence, span, drawn)
                except Exception as exc:  # noqa: BLE001 - it ends this request and no other
                    deltas.append(self._fail_alone(sequence, exc))
        return deltas

    def _fail_alone(self, sequence: Sequence, exc: Exception) -> Delta:
        """End a request whose results could not be applied."""
        log.error("a request fails; no other is affected", exc_info=exc)
        self.forget(sequence.request_id)
        error = GenerationFailed("The engine failed on this request; no other is affected.")
        return Delta(sequence.request_id, None, FinishReason.FAILED, sequence.usage, error)

    def _take_over(self, sequence: Sequence, span: Span, drawn: list[tuple[Sequence, NextToken]]) -> list[Delta]:
        sequence.num_computed = end = span.end
        kept = self.scheduler.keep_prefix(sequence)
        if error := _failure(sequence, drawn, kept):
            return [self._fail(sequence, error)]
        if end < sequence.num_known:
            return []
        if drawn or sequence.targets or sequence.request.labels:
            sequence.num_finite = end
        if sequence.request.labels and not sequence.label_ids:
            return self._begin_labels(sequence)
        if not drawn:
            return [self._end(choice, None, FinishReason.LENGTH) for choice in (sequence, *sequence.siblings)]
        if not sequence.siblings:
            return self._append(*drawn[0])
        siblings, sequence.siblings = sequence.siblings, []
        self.scheduler.share_input(sequence, siblings)
        deltas = [delta for choice, token in drawn for delta in self._append(choice, token)]
        self.scheduler.add_sharing([one for one in siblings if not (one.has_ended or one.awaits_grammar)])
        return deltas

    def _begin_labels(self, first: Sequence) -> list[Delta]:
        """End labels that the input's step has scored whole; other labels continue as their own sequences."""
        deltas, longer = [], []
        labels = first.request.labels
        firsts, following = first.scored[: len(labels)], first.scored[len(labels) :]
        for index, (label, scored) in enumerate(zip(labels, firsts, strict=True)):
            sequence = self._sequence(first.request, first.soft_prompt, index, label)
            sequence.scored, sequence.cached_tokens = [scored], first.cached_tokens
            if label == first.following:
                sequence.scored += following
            if len(label) > 1 and label != first.following:
                longer.append(sequence)
            else:
                deltas.append(self._end(sequence, None, FinishReason.LENGTH))
        if longer:
            self.scheduler.share_input(first, longer)
            self.scheduler.add_sharing(longer)
        self.scheduler.finish(first)
        return deltas

    def _append(self, sequence: Sequence, choice: NextToken) -> list[Delta]:
        """Append a generated token, or pass it to its grammar first."""
        token_id, walk = choice.token_id, sequence.walk
        assert token_id is not None, "a choice that is not finite has been dealt with"
        if walk is None or sequence.ending(token_id, self.model.eos_token_ids) is not None:
            return self._take(sequence, choice)
        self._awaiting_grammar[walk] = (sequence, choice)
        self._walks.accept(walk, token_id, is_last=sequence.is_at_last_token)
        return []

    def _take_accepted(self, *, is_idle: bool) -> list[Delta]:
        """Append tokens that grammars have accepted; waits for slow grammars only if no other sequence can run."""
        deltas: list[Delta] = []
        beginning: list[Sequence] = []
        for walk in self._walks.collect(also_slow=is_idle):
            if walk not in self._awaiting_grammar:  # another choice of its request has just failed
                continue
            sequence, choice = self._awaiting_grammar.pop(walk)
            if walk.error is not None and not sequence.is_at_last_token:
                deltas.append(self._fail(sequence, walk.error))
                continue
            try:
                deltas += self._take(sequence, choice, is_complete=walk.is_complete)
            except Exception as exc:  # noqa: BLE001 - it ends this request and no other
                deltas.append(self._fail_alone(sequence, exc))
            if sequence.slot is None and not sequence.has_ended:
                beginning.append(sequence)
        self.scheduler.add_sharing([one for one in beginning if one.request_id in self._unfinished])
        return deltas

    def _take(self, sequence: Sequence, choice: NextToken, *, is_complete: bool = False) -> list[Delta]:
        """Append a generated token; returns the deltas of all tokens whose text is now final."""
        token_id = choice.token_id
        assert token_id is not None, "a choice that is not finite has been dealt with"
        params = sequence.sampling
        reason = by_id = sequence.ending(token_id, self.model.eos_token_ids)
        sequence.append(token_id)
        if reason is None and is_complete:
            reason = FinishReason.EOS_TOKEN
        elif reason is None and len(sequence.output_ids) >= params.max_new_tokens:
            reason = FinishReason.LENGTH
        token = Token(token_id, "", 0, choice.logprob, token_id in self._special_ids, choice.top)
        is_text = by_id is None or params.include_stop
        certain, stopped = sequence.detokenizer.push(token, is_last=reason is not None, is_text=is_text)
        if stopped and by_id is None:
            reason = FinishReason.STOP_SEQUENCE
        last = certain.pop() if reason is not None else None
        request_id, index = sequence.request.request_id, sequence.index
        deltas = []
        for one in certain:
            scored = sequence.take_scored() if sequence.scored else ()
            deltas.append(Delta(request_id, one, None, None, None, index, scored))
        if reason is not None:
            deltas.append(self._end(sequence, last, reason))
        return deltas

    def _end(self, sequence: Sequence, token: Token | None, reason: FinishReason) -> Delta:
        """End a choice; returns its last Delta, which also ends the request if no other choice is left."""
        sequence.has_ended = True
        self.scheduler.finish(sequence)
        request_id = sequence.request_id
        self._unfinished[request_id] -= 1
        is_last = not self._unfinished[request_id]
        if is_last:
            self._forget(request_id)
        scored = sequence.take_scored()
        return Delta(request_id, token, reason, sequence.usage, None, sequence.index, scored, is_last)

    def _fail(self, sequence: Sequence, error: Exception) -> Delta:
        """End a request because one of its choices has failed."""
        self.scheduler.finish(sequence, scrub=True)
        self.scheduler.abort(sequence.request_id)
        self._forget(sequence.request_id)
        return Delta(sequence.request_id, None, FinishReason.FAILED, sequence.usage, error)

    def _fail_waiting(self) -> list[Delta]:
        return [
            self._fail(sequence, error)
            for prefix_hash, error in self.scheduler.arrivals.take_failed().items()
            for sequence in self.scheduler.waiting_for(prefix_hash)
        ]

    def _forget(self, request_id: str) -> list[Sequence]:
        """Remove an ended request; returns its choices that were waiting for their grammar."""
        self._unfinished.pop(request_id, None)
        return [
            self._awaiting_grammar.pop(walk)[0]
            for walk in self._walks.end(request_id)
            if walk in self._awaiting_grammar
        ]

    def _sequence(
        self,
        request: GenerationRequest,
        soft_prompt: SoftPrompt | None,
        index: int = 0,
        label_ids: tuple[int, ...] = (),
        walk: Walk | None = None,
    ) -> Sequence:
        detokenizer = Detokenizer(self.model.text.tokens, request.sampling, continues_text=request.continues_text)
        return Sequence(request, soft_prompt, detokenizer, index, label_ids, walk)


def _failure(sequence: Sequence, drawn: list[tuple[Sequence, NextToken]], prefix_is_finite: bool) -> Exception | None:
    """The error that ends a sequence after a step, or None."""
    is_finite = prefix_is_finite
    for choice, token in drawn:
        if choice.error is not None:
            log.error("the rules of a request fail; no other is affected", exc_info=choice.error)
            return GenerationFailed("The engine failed on this request; no other is affected.")
        is_finite &= token.token_id is not None
    if is_finite and not (sequence.scored and any(math.isnan(scored.logprob or 0.0) for scored in sequence.scored)):
        return None
    return NotFinite("The model's output is not finite for this soft prompt and input.")
