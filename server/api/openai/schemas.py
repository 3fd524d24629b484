"""Bodies of /v1/completions and /v1/chat/completions.

A field is either offered, or one of OpenAI's that has no effect here and is let through, or an error: a client that
asks for a tool must not get an answer as if it had not. What is null counts as left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from server.api.openai.fields import LogitBias, NotOffered, Schema, Stop, TokenIds
from server.api.openai.messages import Message
from server.api.schemas import Text

MAX_CHOICES = 128
"""Most choices of one request: inputs times what is asked of each."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def offered(cls) -> list[str]:
        """Names of the fields that may hold something."""
        return [name for name, field in cls.model_fields.items() if field.annotation is not type(None)]


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool | None = Field(None, description="A last chunk without choices tells the token counts.")


class StructuredOutputs(_Body):
    """`structured_outputs`, vLLM's way to ask for a form; one of them."""

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


class SamplingBody(_Body):
    """What both kinds of request have: who answers, how tokens are chosen, how the answer is sent."""

    model: str = Field(description="A task, task@version, or the frozen model's name.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Texts for each input; 1.")
    temperature: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="0 is greedy. Default: the task's own, else 0; not 1."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set that reaches p.")
    top_k: int | None = Field(None, ge=-1, description="Sample from the k most likely tokens; 0 and -1 keep all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Keep tokens with this share of the best one's.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Over 0: less of what was said.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Over 0: less of what was said often.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="Over 1: less of what input and output hold."
    )
    logit_bias: LogitBias | None = Field(None, description="Token ids, and -100 to 100 to add to their logits.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="Makes sampling repeatable.")
    stop: Stop | None = Field(None, description="The text ends before the first of these; a text, or up to 16.")
    min_tokens: int | None = Field(None, ge=0, description="No end-of-sequence token before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    skip_special_tokens: bool | None = Field(None, description="False writes special tokens by their names.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the text must match.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, max_length=512, description="Who asks; in a canary one user stays on one side.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")

    @field_validator("stream_options")
    @classmethod
    def _need_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only for a stream; set stream to true")
        return value

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
    """Body of /v1/completions. The text is taken as it is: no template is put around it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "sms_spam", "prompt": "Win a prize now!\n"},
                {"model": "sms_spam", "prompt": ["Win a prize now!\n"], "max_tokens": 0, "echo": True, "logprobs": 1},
                {"model": "sms_spam", "prompt": "Win a prize now!\n", "stream": True, "n": 2, "temperature": 0.7},
            ]
        }
    )

    # Told apart by their first item: to try one after the other would collect an error for each of a million ids.
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
        None, ge=0, description="Most tokens to generate; 0 only looks at the input. Default: the task's own, else 128."
    )
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Generate so many and answer the n of the highest mean log-probability."
    )
    echo: bool | None = Field(None, description="Begin the answer with the input.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the tokens, and so many of the most likely in their place."
    )
    suffix: NotOffered = None

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
        """Texts that are generated for each input."""
        return self.best_of or self.n or 1

    @property
    def new_tokens(self) -> int | None:
        """Most tokens to generate, if the request says so."""
        return self.max_tokens

    @property
    def new_tokens_field(self) -> str:
        """What says so, or would."""
        return "max_tokens"

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are needed, be it only to tell which text is best."""
        return self.logprobs is not None or self.generated > (self.n or 1)

    @property
    def most_likely(self) -> int:
        """Of how many of the most likely tokens the log-probability is asked for."""
        return self.logprobs or 0


class JsonSchema(_Body):
    """`response_format.json_schema`."""

    name: str = Field(max_length=64, description="For people.")
    description: str | None = Field(None, description="For people; the model does not see it.")
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer must match.")
    strict: bool | None = Field(None, description="Has no effect: the schema always holds.")


class ResponseFormat(_Body):
    """`response_format`: OpenAI's, and text-generation-inference's, into which huggingface_hub turns the other."""

    type: Literal["text", "json_object", "json_schema", "json"]
    json_schema: JsonSchema | None = Field(None, validate_default=True)
    value: dict[str, Any] | None = Field(
        None, validate_default=True, description="With json_object or json: a JSON schema for it."
    )

    @field_validator("json_schema")
    @classmethod
    def _is_where_it_belongs(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        if "type" in info.data and (info.data["type"] == "json_schema") != (value is not None):
            raise ValueError("belongs to the type json_schema, which needs it")
        return value

    @field_validator("value")
    @classmethod
    def _has_a_type_that_takes_it(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        kind = info.data.get("type")
        if value is not None and kind not in ("json_object", "json", None):
            raise ValueError("belongs to the types json_object and json")
        if value is None and kind == "json":
            raise ValueError("is needed by the type json")
        return value

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """What the answer must match; None if anything goes."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.value is None else self.value


def _only_text(value: Any) -> Any:
    if value not in (None, ["text"]):
        raise ValueError("only text is offered")
    return value


class ChatBody(SamplingBody):
    """Body of /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "sms_spam", "messages": [{"role": "user", "content": "Win a prize now!"}]},
                {
                    "model": "sms_spam",
                    "messages": [{"role": "user", "content": "Win a prize now!"}],
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
                {
                    "model": "sms_spam",
                    "messages": [{"role": "user", "content": "Win a prize now!"}],
                    "logprobs": True,
                    "top_logprobs": 2,
                    "structured_outputs": {"choice": ["ham", "spam"]},
                },
            ]
        }
    )

    messages: list[Message] = Field(
        min_length=1, fail_fast=True, description="The conversation, as far as it has come."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate. Default: the task's own, else 128."
    )
    max_tokens: int | None = Field(None, ge=1, description="The same, by its older name.")
    logprobs: bool | None = Field(None, description="Answer the log-probability of every token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Also so many of the most likely in its place.")
    response_format: ResponseFormat | None = Field(None, description="What the answer must match.")
    modalities: Annotated[list[str] | None, BeforeValidator(_only_text)] = Field(None, description="Only text.")
    audio: NotOffered = None
    function_call: NotOffered = None
    functions: NotOffered = None
    parallel_tool_calls: NotOffered = None
    prediction: NotOffered = None
    reasoning_effort: NotOffered = None
    tool_choice: NotOffered = None
    tools: NotOffered = None
    verbosity: NotOffered = None
    web_search_options: NotOffered = None

    @field_validator("max_tokens")
    @classmethod
    def _is_the_same(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_completion_tokens") not in (None, value):
            raise ValueError("is the same as max_completion_tokens, and differs from it; send one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
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
        """Most tokens to generate, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def new_tokens_field(self) -> str:
        """What says so, or would."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.logprobs)

    @property
    def most_likely(self) -> int:
        """Of how many of the most likely tokens the log-probability is asked for."""
        return self.top_logprobs or 0
