"""Dataclasses that all layers share: engine requests and their results, independent of torch and HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts about the frozen model for the rest of the server."""

    name: str
    fingerprint: str
    """Identity of the weights (design: config fields and a sample of embedding rows), independent of dtype."""
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    num_attention_heads: int | None = None
    """Heads of queries; None if it is unknown."""
    num_attention_layers: int | None = None
    """Layers that keep keys and values, if not all do."""
    state_width: int = 0
    """Size of the recurrent state that each sequence has beside its keys and values; 0 in pure attention models."""

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.num_hidden_layers if self.num_attention_layers is None else self.num_attention_layers

    @property
    def kv_width(self) -> int:
        """Numbers per virtual token in a KV soft prompt as PEFT saves it: layers x (K, V) x heads x head_dim."""
        return self.num_kv_layers * 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class TemplatedText:
    """A text for the model that contains users' texts, and their positions in it.

    Attributes:
        text: the whole text; the template's own part may contain special tokens.
        user_spans: `(start, stop)` in characters of each user's text that is not empty, in order. Without spans, the
            text is raw, and all of it may contain special tokens.
    """

    text: str
    user_spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, *parts: tuple[str, bool]) -> TemplatedText:
        """Join parts to a text; each part has a flag whether a user wrote it."""
        spans, at = [], 0
        for part, is_user in parts:
            if is_user and part:
                spans.append((at, at + len(part)))
            at += len(part)
        return cls("".join(part for part, _ in parts), tuple(spans))

    def behind(self, preamble: str) -> TemplatedText:
        """This text after another user's text; a raw text stays raw."""
        if not self.user_spans:
            return TemplatedText(preamble + self.text)
        moved = [(start + len(preamble), stop + len(preamble)) for start, stop in self.user_spans]
        return TemplatedText(preamble + self.text, ((0, len(preamble)), *moved) if preamble else tuple(moved))

    def last(self, characters: int) -> TemplatedText:
        """The last `characters` characters of this text."""
        cut = max(0, len(self.text) - characters)
        spans = ((max(0, start - cut), stop - cut) for start, stop in self.user_spans if stop > cut)
        return TemplatedText(self.text[cut:], tuple(spans))


class FinishReason(StrEnum):
    """Why a sequence ended; the first three are text-generation-inference's reasons."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105
    STOP_SEQUENCE = "stop_sequence"
    ABORTED = "aborted"
    FAILED = "failed"


COLDEST = 1e-5


class ChatEnd(StrEnum):
    """Where the text of a chat that the model reads ends."""

    ANSWER = "answer"
    """At the beginning of the model's message."""
    CONTINUE = "continue"
    """Within the last message, which the model continues."""
    TURN = "turn"
    """After the last message."""


class GrammarKind(StrEnum):
    """The language of a grammar's source."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"
    EBNF = "ebnf"


MAX_SCHEMA_DEPTH = 124
"""Maximum nesting of a JSON schema: the 128 levels of llguidance's parser, less the levels of its own wrapping."""

TOO_DEEP = f"it is nested more than {MAX_SCHEMA_DEPTH} deep"
"""Why a JSON schema cannot be used; several checks report it."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that the generated text must match."""

    kind: GrammarKind
    source: str
    """A JSON schema, a regular expression, a JSON list of texts, a Lark grammar, or an EBNF grammar in GBNF's form.

    EBNF may also be Lark, where a line begins with `start:`, `?start:` or `%llguidance`: vLLM's clients send either.
    """
    after_space: bool = False
    """The tokens match the grammar after a space, which the tokenizer adds before a text and the text lacks."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled. The defaults are greedy decoding of 128 tokens."""

    max_new_tokens: int = 128
    """0 generates nothing: the input is only evaluated, for its log-probabilities."""
    min_new_tokens: int = 0
    """End-of-sequence tokens are not eligible before this many tokens; a grammar may end earlier."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it, before the filters."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (Holtzman et al. 2020); 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the best one's probability (Nguyen et al. 2024); 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens of most typical surprise whose probability reaches p (Meister et al. 2022); 1 keeps all."""
    repetition_penalty: float = 1.0
    """CTRL's penalty (Keskar et al. 2019) over input and output tokens; 1 is off. Virtual tokens have no id."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once for each occurrence in the output; 0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and the numbers that are added to their logits."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The text ends before the first occurrence of any of these; one that ends within `min_new_tokens` is ignored."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end a generation like end-of-sequence tokens, even if those are ignored."""
    include_stop: bool = False
    """Whether the stop string or stop token is a part of the text."""
    show_special: bool = False
    """Whether special tokens appear in the text, by their names."""
    ignore_eos: bool = False
    logprobs: bool = False
    """Report the chosen token's log-probability under the model's own distribution."""
    top_logprobs: int = 0
    """With `logprobs`: also report this many of the most likely tokens."""
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen; temperatures too low for a float count as greedy."""
        return self.temperature < COLDEST


Queue = tuple[str | None, str | None]
"""A task and a key: requests that share both wait for each other; queues that share the key share its slots."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted request: token ids, sampling parameters, and the queue that it waits in.

    It has one or more choices, which share the input: `n` texts that are sampled apart, or the labels to be scored.
    """

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: str | None = None
    key_id: str | None = None
    """The id of the request's key, if keys are required: a key may have a limited share of the server."""
    n: int = 1
    input_logprobs: bool = False
    """Report the log-probability of every input token but the first."""
    input_top_logprobs: int = 0
    """With `input_logprobs`: also report this many of the most likely tokens at each position."""
    continues_text: bool = True
    """Whether the text continues the input; otherwise it begins like a training target, tokenised separately."""
    is_background: bool = False
    """Whether the server itself sends it, beside live requests: such requests have a separate share."""
    is_part: bool = False
    """Whether it belongs to a request that is accepted and counted already, see `EngineWorker.holding`."""
    labels: tuple[tuple[int, ...], ...] = ()
    """Token ids of continuations. If given, nothing is generated; each label is a choice, which is scored."""

    @property
    def num_choices(self) -> int:
        """Number of the request's choices."""
        return len(self.labels) or self.n

    @property
    def queue(self) -> Queue:
        """The request's queue; a key that floods a task does not delay other keys of that task."""
        return self.task, self.key_id


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token, chosen or not, and its log-probability in the model's own distribution."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Scored:
    """An input token, with the log-probability that the model assigned to it."""

    id: int
    logprob: float | None
    """None for the first token, which no token with an id precedes."""
    top: tuple[Candidate, ...] = ()
    """The most likely tokens at its position."""
    rank: int | None = None
    """Number of tokens that were at least as likely, including itself; only known for tokens of the input."""


class Token(NamedTuple):
    """One generated token. The texts of a choice's tokens, joined, are its generated text."""

    id: int
    text: str = ""
    """The text that the token adds; empty for a hidden special token, or if a stop string removed it."""
    offset: int = 0
    """Characters of the generated text before it, counted as if no stop string had come."""
    logprob: float | None = None
    special: bool = False
    top: tuple[Candidate, ...] = ()
    """The most likely tokens at its position, if requested."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one choice."""

    virtual_tokens: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Virtual tokens whose keys and values were cached."""
    queued_seconds: float = 0.0
    """From the acceptance of the request to its slot; includes the wait for a prefix that arrives or is computed."""
    prefix_seconds: float = 0.0
    """For the computation of its soft prompt's prefix after that; 0 if the prefix was in memory."""


@dataclass(slots=True)
class Delta:
    """The result of one engine step for one choice of a request; a choice's last delta has `finish_reason`.

    Treat it as immutable. It is not a frozen dataclass, because a step creates one for each sequence, and creating
    frozen ones takes three times as long.
    """

    request_id: str
    token: Token | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None
    """Set with FAILED: the error for the client."""
    index: int = 0
    """Number of the choice in its request."""
    scored: tuple[Scored, ...] = ()
    """Scores of given tokens (the input's or the label's); set only in a choice's first delta."""
    is_last: bool = True
    """With `finish_reason`: whether the whole request has ended. ABORTED and FAILED end it, whatever its choices."""
