"""One choice of a request in flight: its input, its state and its progress."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from server.contracts import FinishReason, GenerationRequest, Scored, Usage
from server.engine.memory.kv_cache import Computed
from server.engine.memory.slots import Slot
from server.engine.sampling.seen_tokens import SeenTokens
from server.engine.text.detokenizer import Detokenizer
from server.soft_prompts.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    from server.engine.attention.cached_rows import Span
    from server.engine.grammars.walks import Walk


@dataclass(eq=False)
class Sequence:
    """A choice from admission to its end; most requests have one. Its reference keeps its soft prompt in memory.

    Its positions are, in this order: virtual tokens, given tokens, output tokens. The given tokens are the input and,
    if a label is scored, all tokens of the label except the last one: that one is predicted, never fed to the model. If
    only one label of a request has several tokens, they follow the input in the same step, so no label needs a second.
    """

    request: GenerationRequest
    soft_prompt: SoftPrompt | None
    detokenizer: Detokenizer
    index: int = 0
    """Which choice of its request."""
    label_ids: tuple[int, ...] = ()
    """Tokens of a label to score; such a sequence generates nothing."""
    walk: Walk | None = None
    """Which tokens its grammar allows next."""
    siblings: list[Sequence] = field(default_factory=list)
    """The other choices of its request; they begin once this one has computed what they share."""
    shared: Computed | None = None
    """A copy of the positions that its request's first choice has computed for it, until it has a slot."""
    slot: Slot | None = None
    num_computed: int = 0
    """Positions whose keys and values are in the slot."""
    num_finite: int = 0
    """Positions whose keys and values are finite for certain: a later token has been drawn from finite logits."""
    cached_tokens: int = 0
    """Virtual tokens whose keys and values came from the prefix cache; a sibling has its first choice's number."""
    accepted_at: float = field(default_factory=time.monotonic)
    queued_seconds: float = 0.0
    """Seconds from acceptance (`accepted_at`) to admission."""
    prefix: int = 0
    """The number of the cached prefix at the start of its slot; 0 if no other sequence has the same."""
    prefix_seconds: float = 0.0
    """Seconds from admission until it has computed its soft prompt's prefix, if it computes one."""
    output_ids: list[int] = field(default_factory=list)
    decoded_in: int = 0
    """The last step in which it decoded while its API key had a share of the step; `FairSteps` gives turns by it."""
    has_ended: bool = False
    """Whether its last Delta was made."""
    error: Exception | None = None
    """The error that the sequence's sampling rules raised in the last step, if any."""
    scored: list[Scored] = field(default_factory=list)
    """Given tokens whose log-probabilities are known; they go out with the first Delta."""

    def __post_init__(self) -> None:
        self.sampling = self.request.sampling
        seed = self.sampling.seed
        self.rng = random.Random(seed if self.index == 0 else f"{seed}/{self.index}")
        self._uniform: float | None = None
        repetition, presence = self.sampling.repetition_penalty, self.sampling.presence_penalty
        has_penalties = repetition != 1.0 or presence or self.sampling.frequency_penalty
        repeatable = self.request.input_ids if repetition != 1.0 else ()  # the other penalties count the output only
        self.seen = SeenTokens(repeatable, presence, self.sampling.frequency_penalty) if has_penalties else None
        """What its penalties read, if it has any."""
        self.following = self.label_ids or only_long_label(self.request.labels)
        """The label whose tokens follow the input."""
        self.given_ids = self.request.input_ids + self.following[:-1]
        self.num_virtual_tokens = 0 if self.soft_prompt is None else self.soft_prompt.num_virtual_tokens
        self.num_input = self.num_virtual_tokens + len(self.request.input_ids)  # shared by the request's choices
        self._num_given = self.num_virtual_tokens + len(self.given_ids)
        self.num_known = self._num_given + len(self.output_ids)
        """Number of positions whose token is known, whether or not the model has processed them yet."""
        self.needs_next_token = not self.request.labels and self.sampling.max_new_tokens > 0
        """Whether generation continues after the given tokens."""
        self.targets: tuple[int, ...] = ()  # the given tokens to score
        self.first_target = self.num_virtual_tokens  # the position whose row says how likely the first of them was
        if self.following:
            self.targets, self.first_target = self.following[1:], self.num_input
        elif self.request.input_logprobs and self.index == 0 and not self.request.labels:
            self.scored = [Scored(self.request.input_ids[0], None)]
            self.targets = self.request.input_ids[1:]
        self.is_greedy = self.sampling.is_greedy
        has_rules = has_penalties or self.sampling.logprobs or self.sampling.logit_bias or self.sampling.grammar
        self.is_plain = self.is_greedy and not has_rules
        """Whether decoding is plain greedy; end tokens are still skipped until `min_new_tokens` is reached."""

    @property
    def request_id(self) -> str:
        """The id under which the request was accepted."""
        return self.request.request_id

    @property
    def awaits_grammar(self) -> bool:
        """Whether its grammar has not taken its last token yet."""
        return self.walk is not None and self.walk.is_waiting

    @property
    def is_at_last_token(self) -> bool:
        """Whether no token may come after the next one."""
        return len(self.output_ids) + 1 >= self.sampling.max_new_tokens

    @property
    def num_pending(self) -> int:
        """Positions that the next steps must compute: 1 while decoding, more while prefilling."""
        return self.num_known - self.num_computed

    @property
    def max_positions(self) -> int:
        """Positions that it can ever need; the last new token is never fed."""
        new = 0 if self.request.labels else max(0, self.sampling.max_new_tokens - 1)
        return self._num_given + new

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            self.num_virtual_tokens,
            len(self.request.input_ids),
            len(self.output_ids),
            self.cached_tokens,
            self.queued_seconds,
            self.prefix_seconds,
        )

    def scored_positions(self, span: Span) -> range:
        """The positions in this span whose logits give the probability of the next token of `targets`."""
        first = max(span.start, self.first_target)
        return range(first, max(first, min(span.end, self.first_target + len(self.targets))))

    def needs_next_after(self, span: Span) -> bool:
        """Whether the logits of the span's last known position decide the next token."""
        return self.needs_next_token and span.end == self.num_known

    def scores_labels_in(self, span: Span) -> bool:
        """Whether this span holds the input's last position, whose logits score the first token of each label."""
        return bool(self.request.labels) and not self.label_ids and span.start < self.num_input <= span.end

    def token_at(self, position: int) -> int:
        """Token id at a position after the virtual tokens."""
        index = position - self._num_given
        return self.given_ids[index] if index < 0 else self.output_ids[index]

    def next_uniform(self) -> float:
        """The uniform number that its next token is drawn with; the same until a token is appended."""
        if self._uniform is None:
            self._uniform = self.rng.random()
        return self._uniform

    def take_scored(self) -> tuple[Scored, ...]:
        """The given tokens that were scored, once."""
        if not self.scored:
            return ()
        scored, self.scored = tuple(self.scored), []
        return scored

    def ending(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """The finish reason if this token itself ends the text (end token, stop token id), else None."""
        params = self.sampling
        if token_id in eos_token_ids and (self.walk is not None or not params.ignore_eos):
            return FinishReason.EOS_TOKEN
        is_early = len(self.output_ids) < params.min_new_tokens  # only a grammar lets it come so soon
        return FinishReason.STOP_SEQUENCE if token_id in params.stop_token_ids and not is_early else None

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        self.output_ids.append(token_id)
        self.num_known += 1
        self._uniform = None
        if self.seen is not None:
            self.seen.add(token_id)

    @cached_property
    def filters(self) -> np.ndarray:
        """What a draw depends on, float64: temperature, top-k, and the masses of top-p, min-p and typical-p."""
        params = self.sampling
        return np.array([params.temperature, params.top_k, _mass(params.top_p), params.min_p, _mass(params.typical_p)])

    @cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[biases]`, and what is added to their logits."""
        ids, biases = zip(*self.sampling.logit_bias, strict=True) if self.sampling.logit_bias else ((), ())
        return np.array(ids, dtype=np.int64), np.array(biases, dtype=np.float64)


def only_long_label(labels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The label with several tokens, if there is exactly one; else empty."""
    long = [label for label in labels if len(label) > 1]
    return long[0] if len(long) == 1 else ()


def _mass(share: float) -> float:
    """The mass at which a filter ends: infinity for a share of 1; for 0 so little that the likeliest token remains."""
    return max(share, math.ulp(0.0)) if share < 1.0 else math.inf
