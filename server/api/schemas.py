"""Bodies of requests and replies. Unknown fields are errors: a misspelt option must not silently do nothing.

A field that is null counts as left out, whether it is known or not: clients send all fields that they know of, and null
for those that nobody has set.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.contracts import TOO_DEEP, Grammar, GrammarKind
from server.errors import InvalidRequest, PreludeError


def is_text(value: str) -> str:
    """Refuse lone surrogates, which JSON allows but UTF-8 cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise ValueError("holds half of a surrogate pair, which is not text") from exc
    return value


Text = Annotated[str, AfterValidator(is_text)]
"""A string that can be encoded as UTF-8. JSON may contain strings that cannot (lone surrogates)."""


MAX_GRAMMAR_CHARACTERS = 2**18
MAX_STOP_IDS = 128


def grammar_of(kind: GrammarKind, text: str) -> Grammar:
    """A grammar for the engine; raises InvalidRequest if it is so long that compiling it would take seconds."""
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(
            f"The grammar has {len(text):,} characters; at most {MAX_GRAMMAR_CHARACTERS:,} are taken.",
            remedy="Simplify it.",
        )
    return Grammar(kind, text)


def schema_text(schema: Any) -> str:
    """A JSON schema as text; raises InvalidRequest if it is nested so deeply that it cannot be serialised."""
    try:
        return schema if isinstance(schema, str) else json.dumps(schema)
    except RecursionError as exc:
        raise InvalidRequest(f"The JSON schema cannot be used: {TOO_DEEP}.", remedy="Simplify it.") from exc


class RequestBody(BaseModel):
    """An object of a request. An unknown field is an error, unless it is null."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: item for name, item in value.items() if item is not None or name in known}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema)["additionalProperties"] = {"type": "null"}
        return schema


class StrictBody(RequestBody):
    """An object whose values are not converted: "1" is no number."""

    model_config = ConfigDict(strict=True)


class SamplingFields(StrictBody):
    """The sampling fields that both front ends have."""

    temperature: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="0 is greedy. Default: the task's own, else 0."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set that reaches p.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Sample from tokens with at least this share of the likeliest one's probability."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0, tokens of the output become less likely."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0, frequent tokens of the output become less likely."
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100,
        allow_inf_nan=False,
        description="Above 1, tokens of input and output become less likely.",
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, max_length=MAX_STOP_IDS, description="Tokens that end the text."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep the stop string, or the token of stop_token_ids, at the end of the text."
    )

    def given(self, *names: str) -> dict[str, Any]:
        """The shared fields, and those with these names, that the request sets, as fields of SamplingParams."""
        shared = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        fields = {name: value for name in (*shared, *names) if (value := getattr(self, name)) is not None}
        if self.stop_token_ids is not None:
            fields["stop_token_ids"] = frozenset(self.stop_token_ids)
        return {**fields, "include_stop": bool(self.include_stop_str_in_output)}


class ErrorBody(BaseModel):
    """Every error: what was wrong, its kind in text-generation-inference's words, its code, and what to do."""

    error: str
    error_type: str
    code: str
    remedy: str


def error_body(error: PreludeError) -> dict[str, str]:
    """An error as JSON, the same in replies and in streams."""
    message = error.message.encode("utf-8", "backslashreplace").decode()  # it may quote half a surrogate pair
    body = ErrorBody(error=message, error_type=error.family, code=error.code, remedy=error.remedy)
    return body.model_dump()


Responses = dict[int | str, dict[str, Any]]
"""Replies of a route beside the usual one, by status, for the OpenAPI document."""


_ERRORS = {
    400: "The body cannot be read as JSON text.",
    401: "The server wants a key, and there is none or a wrong one.",
    403: "The key lacks the scope, or is not for this task.",
    404: "No such task or version.",
    413: "The body is too large.",
    500: "The engine could not finish the request.",
    503: "The server is shutting down.",
}


def responses(*usual: int, model: type[BaseModel] = ErrorBody, **others: str) -> Responses:
    """OpenAPI's errors of a route: statuses with their usual description, or as `on_409="It is not done."`."""
    texts = {status: _ERRORS[status] for status in usual}
    texts |= {int(name.removeprefix("on_")): text for name, text in others.items()}
    return {status: {"model": model, "description": text} for status, text in sorted(texts.items())}


class ActivateBody(RequestBody):
    """POST /prompts/{task}/activate."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: int = Field(ge=1, strict=True)


class Health(BaseModel):
    """/health, /ready and /ping."""

    status: str


class Live(BaseModel):
    """/v2/health/live."""

    live: bool


class Ready(BaseModel):
    """/v2/health/ready."""

    ready: bool


class PrefixInfo(BaseModel):
    """How often requests found their soft prompt's prefix computed, since the server started."""

    hits: int = Field(description="Requests that found it, or waited for another one that computed it.")
    misses: int = Field(description="Requests that had to compute it; each publish makes one.")
    budget_bytes: int = Field(description="Memory that prefixes may take.")


class Info(BaseModel):
    """/info: Prelude's fields first, then text-generation-inference's fields that they do not cover."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    fingerprint: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_model_len: int
    max_virtual_tokens: int
    dtype: str
    device: str
    version: str
    tasks: int
    in_flight: int
    prefixes: PrefixInfo
    model_id: str = Field(description="The same as `model`.")
    model_sha: str | None = Field(description="Null: the model's commit is not known. `fingerprint` identifies it.")
    model_dtype: str = Field(description="torch.float32, torch.bfloat16, …")
    model_device_type: str = Field(description="cpu or cuda.")
    model_pipeline_tag: str
    max_concurrent_requests: int = Field(description="Answers that may run or wait; beyond that requests get 429.")
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int = Field(description="Virtual tokens included.")
    max_total_tokens: int = Field(description="The same as `max_model_len`.")
    validation_workers: int = Field(description="Threads that tokenise long texts.")
    max_client_batch_size: int = Field(description="Texts in one request.")
    router: str
    sha: str | None = Field(description="Null: the server's commit is not known.")
    docker_label: str | None = Field(description="Null: the image is not known.")
