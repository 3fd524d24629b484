"""Bodies of /v1/completions and /v1/chat/completions.

A field is supported, or accepted without effect, or an error: a client that requests a tool must not get an answer as
if it had not. Even unsupported fields accept values that request nothing: null, which always means that the field is
left out, or an empty list of tools.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from server.api.openai.fields import (
    Idle,
    LogitBias,
    NoList,
    NoReasoning,
    NoText,
    NotOffered,
    NoTool,
    OnlyText,
    Schema,
    Stop,
    TokenIds,
    UsualVerbosity,
)
from server.api.openai.messages import Message
from server.api.openai.response_format import ResponseFormat
from server.api.schemas import SamplingFields, StrictBody, Text
from server.contracts import ChatEnd

MAX_CHOICES = 128
"""Maximum number of choices of one request: inputs times texts for each input."""


class StreamOptions(StrictBody):
    """`stream_options`."""

    include_usage: bool | None = Field(None, description="A last chunk without choices reports the token counts.")
    include_obfuscation: bool | None = Field(None, description="Has no effect: chunks are not padded.")


class StructuredOutputs(StrictBody):
    """`structured_outputs`: vLLM's way to constrain the output. Exactly one field must be set."""

    json_: Schema | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: Text | None = Field(None, description="A regular expression that the whole text matches.")
    choice: list[Text] | None = Field(None, min_length=1, max_length=4096, description="The text is one of these.")
    grammar: Text | None = Field(
        None, description="An EBNF grammar in the form of llama.cpp's GBNF, or a Lark grammar with a start rule."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("name one of json, regex, choice and grammar")
        return self


class SamplingBody(SamplingFields):
    """The fields that completions and chats share: the model, sampling, and how the reply is sent."""

    model: str = Field(description="A task, task@version, or the frozen model's name.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Texts for each input; 1.")
    top_k: int | None = Field(None, ge=-1, description="Sample from the k most likely tokens; 0 and -1 keep all.")
    logit_bias: LogitBias | None = Field(None, description="Token ids, and -100 to 100 to add to their logits.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Makes sampling repeatable.")
    stop: Stop | None = Field(None, description="The text ends before the first of these; a text, or up to 16.")
    min_tokens: int | None = Field(None, ge=0, description="Minimum number of new tokens.")
    ignore_eos: bool | None = Field(None, description="Continue after the end-of-sequence token.")
    skip_special_tokens: bool | None = Field(None, description="False writes special tokens by their names.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the text must match.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the input's tokens and of this many likely alternatives."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, max_length=512, description="The user's id; a user stays on one side of a canary.")
    metadata: dict[str, str | None] | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Has no effect.")
    prompt_cache_retention: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")

    @field_validator("stream_options")
    @classmethod
    def _need_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only for a stream; set stream to true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _are_not_streamed(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("cannot be streamed; set stream to false")
        return value

    @classmethod
    def offered(cls) -> list[str]:
        """Names of the fields that can have an effect."""
        return [name for name, field in cls.model_fields.items() if Idle not in field.metadata]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


def _kind_of_input(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    kinds = {str: "texts", int: "ids", list: "lists"}
    return next((kind for cls, kind in kinds.items() if isinstance(first, cls)), None)


class CompletionBody(SamplingBody):
    """Body of /v1/completions. The text is used unchanged, without a template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "sms_spam", "prompt": "Win a prize now!\n"},
                {"model": "sms_spam", "prompt": ["Win a prize now!\n"], "max_tokens": 0, "echo": True, "logprobs": 1},
                {"model": "sms_spam", "prompt": "Win a prize now!\n", "stream": True, "n": 2, "temperature": 0.7},
            ]
        }
    )

    # The first item decides the type. Trying each member of the union would collect an error for each of a million ids.
    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("lists")],
        Discriminator(
            _kind_of_input,
            custom_error_type="no_input",
            custom_error_message="must be a text, a list of texts, token ids, or a list of lists of token ids",
        ),
    ] = Field(description="A text, a list of texts, token ids, or a list of lists of token ids.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="Maximum number of new tokens; 0 only evaluates the input. Default: the task's own, else 128.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate this many texts and return the n with the highest mean log-probability.",
    )
    echo: bool | None = Field(None, description="Begin the answer with the input.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the tokens and of this many likely alternatives."
    )
    suffix: NoText = None

    @field_validator("best_of")
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if value is not None and value < n:
            raise ValueError("must be at least n")
        if value is not None and value > n and info.data.get("stream"):
            raise ValueError("cannot be streamed: which text is best is only known when all have ended")
        return value

    @property
    def generated(self) -> int:
        """Number of texts to generate for each input."""
        return self.best_of or self.n or 1

    @property
    def new_tokens(self) -> int | None:
        """Maximum number of new tokens; None if the request does not set it."""
        return self.max_tokens

    @property
    def new_tokens_field(self) -> str:
        """Name of the field that sets `new_tokens`."""
        return "max_tokens"

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are needed, for the reply or to rank the texts of `best_of`."""
        return self.logprobs is not None or self.generated > (self.n or 1)

    @property
    def most_likely(self) -> int:
        """Number of most likely tokens whose log-probabilities are requested."""
        return self.logprobs or 0


_CHAT: dict[str, Any] = {"model": "sms_spam", "messages": [{"role": "user", "content": "Win a prize now!"}]}


class ChatBody(SamplingBody):
    """Body of /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                _CHAT,
                {**_CHAT, "stream": True, "stream_options": {"include_usage": True}},
                {**_CHAT, "logprobs": True, "top_logprobs": 2, "structured_outputs": {"choice": ["ham", "spam"]}},
            ]
        }
    )

    messages: list[Message] = Field(min_length=1, fail_fast=True, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Maximum number of new tokens. Default: the task's own, else 128."
    )
    max_tokens: int | None = Field(None, ge=1, description="The same, by its older name.")
    add_generation_prompt: bool | None = Field(
        None, description="False ends what the model reads after the last message, without the start of an answer."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message instead of answering it; excludes add_generation_prompt."
    )
    logprobs: bool | None = Field(None, description="Report the log-probability of every token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Also for this many likely alternatives.")
    response_format: ResponseFormat | None = Field(None, description="What the answer must match.")
    modalities: OnlyText = None
    audio: NotOffered = None
    function_call: NoTool = None
    functions: NoList = None
    moderation: NotOffered = None
    parallel_tool_calls: bool | None = Field(None, description="Has no effect: there are no tools.")
    prediction: NotOffered = None
    reasoning_effort: NoReasoning = None
    tool_choice: NoTool = None
    tools: NoList = None
    verbosity: UsualVerbosity = None
    web_search_options: NotOffered = None

    @field_validator("max_tokens")
    @classmethod
    def _is_the_same(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_completion_tokens") not in (None, value):
            raise ValueError("is the same as max_completion_tokens, and differs from it; send one of them")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _is_the_only_end(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("excludes add_generation_prompt; send one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("needs logprobs to be true")
        return value

    @field_validator("response_format")
    @classmethod
    def _is_the_only_form(cls, value: ResponseFormat | None, info: ValidationInfo) -> ResponseFormat | None:
        if value is not None and info.data.get("structured_outputs") is not None:
            raise ValueError("excludes structured_outputs; send one of them")
        return value

    @property
    def new_tokens(self) -> int | None:
        """Maximum number of new tokens; None if the request does not set it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def new_tokens_field(self) -> str:
        """Name of the field that sets `new_tokens`."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def end(self) -> ChatEnd:
        """Where the rendered chat ends."""
        if self.continue_final_message:
            return ChatEnd.CONTINUE
        return ChatEnd.TURN if self.add_generation_prompt is False else ChatEnd.ANSWER

    @property
    def wants_logprobs(self) -> bool:
        """Whether the request asks for log-probabilities."""
        return bool(self.logprobs)

    @property
    def most_likely(self) -> int:
        """Number of most likely tokens whose log-probabilities are requested."""
        return self.top_logprobs or 0
