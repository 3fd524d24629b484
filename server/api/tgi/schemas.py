"""Bodies of the native routes, with text-generation-inference's names. Unknown fields are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from server.api.error_format import ErrorFormat
from server.api.schemas import SamplingFields, StrictBody, Text, grammar_of, schema_text
from server.contracts import Grammar, GrammarKind
from server.interpret.results import Influence

MANY = "/generate_many"

MAX_INPUTS = 128
MAX_BEST_OF = 64
MAX_CHOICES = 128
MAX_GENERATED = 128
"""Maximum number of texts that one request generates: its inputs times `best_of`."""
MAX_SCORED = 2048
"""Maximum number of labels that one request scores: its inputs times `choices`."""
MAX_TARGETS = 32
MAX_ANSWER_IDS = 8192
MAX_STOP = 16
MAX_TOP_TOKENS = 20

NO_EFFECT_ON_CHOICES = ("adapter_id", "choices", "length_normalized", "truncate")
"""Parameters that are allowed together with `choices`; all others concern generation."""


class GrammarBody(StrictBody):
    """A grammar that the generated text must match."""

    type: Literal["json", "json_schema", "regex", "lark", "ebnf"]
    value: Any = Field(
        description="A JSON schema, as an object or as text; {name, schema} for json_schema; a regular expression; "
        "a Lark grammar; an EBNF grammar in the form of llama.cpp's GBNF.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "object"}]},
    )

    @model_validator(mode="after")
    def _fits(self) -> GrammarBody:
        if self.type in ("regex", "lark", "ebnf") and not isinstance(self.value, str):
            raise ValueError(f"the value of {self.type} is a text")
        if self.type == "json" and not isinstance(self.value, str | dict):
            raise ValueError("the value of json is a JSON schema, as an object or as text")
        if self.type == "json_schema" and not (isinstance(self.value, dict) and "schema" in self.value):
            raise ValueError("the value of json_schema is an object with a schema")
        return self

    @property
    def grammar(self) -> Grammar:
        """The grammar in the engine's form."""
        if self.type in ("regex", "lark", "ebnf"):
            return grammar_of(GrammarKind(self.type), str(self.value))
        schema = self.value["schema"] if self.type == "json_schema" else self.value
        return grammar_of(GrammarKind.JSON_SCHEMA, schema_text(schema))


class GenerateParameters(SamplingFields):
    """Parameters by text-generation-inference's names.

    A null parameter takes the task's default, then greedy decoding.
    """

    adapter_id: str | None = Field(None, description="The task; the same as ?task=.")
    do_sample: bool | None = Field(None, description="false is greedy; true samples at temperature 1 unless given.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Maximum number of new tokens. Default: the task's own, else 128."
    )
    min_new_tokens: int | None = Field(None, ge=0, description="Minimum number of new tokens.")
    top_k: int | None = Field(None, ge=1, description="Sample from the k most likely tokens.")
    typical_p: float | None = Field(None, gt=0, le=1, description="Sample from the most typical tokens that reach p.")
    seed: int | None = Field(None, ge=0, lt=2**64, description="Makes sampling repeatable.")
    stop: list[Annotated[Text, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=MAX_STOP, description="The text ends before the first of these."
    )
    ignore_eos_token: bool | None = Field(None, description="Continue after the end-of-sequence token.")
    grammar: GrammarBody | None = Field(None, description="What the text must match.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_BEST_OF,
        description="Generate this many texts and return the one with the highest mean log-probability.",
    )
    choices: list[Annotated[Text, Field(min_length=1, max_length=1024)]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CHOICES,
        description="Generate nothing; return the probability of each of these texts, and the likeliest as the answer.",
    )
    length_normalized: bool | None = Field(
        None, description="With choices: compare mean log-probabilities of their tokens instead of sums."
    )
    truncate: int | None = Field(None, ge=1, description="Keep only this many input tokens, the last ones.")
    return_full_text: bool | None = Field(None, description="Prepend `inputs` to the generated text.")
    details: bool | None = Field(None, description="Report finish reason, token counts and every token.")
    decoder_input_details: bool | None = Field(
        None, description="Details with the input's tokens and their log-probabilities; not in a stream."
    )
    top_n_tokens: int | None = Field(
        None, ge=0, le=MAX_TOP_TOKENS, description="Details with this many of the most likely tokens at each position."
    )
    influence: bool | None = Field(
        None, description="Details with the influence of each virtual token on each output token; not in a stream."
    )
    watermark: bool | None = Field(None, description="Only false.")

    @field_validator("watermark")
    @classmethod
    def _not_offered(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("watermark is not supported by this server; leave it out")
        return value

    @field_validator("choices")
    @classmethod
    def _are_different(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("the same text comes twice")
        return value

    @model_validator(mode="after")
    def _generate_or_choose(self) -> GenerateParameters:
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, False, [])]
        if self.choices is not None:
            idle = [name for name in given if name not in NO_EFFECT_ON_CHOICES]
            if idle:
                raise ValueError(f"{idle[0]} has no effect on choices, which are scored, not generated; leave it out")
        elif self.length_normalized:
            raise ValueError("length_normalized needs choices")
        return self

    @property
    def wants_details(self) -> bool:
        """Whether the reply has `details`."""
        return bool(self.details or self.decoder_input_details or self.top_n_tokens)


def _kind_of_inputs(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "texts" if isinstance(value, list) else None


class _AnsweredBody(StrictBody):
    """The fields that bodies with one text or several share."""

    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    user: str | None = Field(None, max_length=512, description="The user's id; a user stays on one side of a canary.")

    @field_validator("parameters", mode="before", json_schema_input_type=GenerateParameters | None)
    @classmethod
    def _null_is_default(cls, value: object) -> object:
        return {} if value is None else value


class GenerateBody(_AnsweredBody):
    """Body of /generate, /generate_stream and /."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "Win a prize now!"},
                {"inputs": "Win a prize now!", "parameters": {"choices": ["ham", "spam"]}},
                {"inputs": ["Win a prize now!", "See you at six."], "parameters": {"details": True, "seed": 1}},
                {"inputs": "Win a prize now!", "parameters": {"max_new_tokens": 5, "temperature": 0.7}, "stream": True},
            ]
        }
    )

    inputs: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS), Tag("texts")],
        Discriminator(
            _kind_of_inputs, custom_error_type="no_text", custom_error_message="must be a text or a list of texts"
        ),
    ] = Field(description="The text, or a list of texts; the task's input_template is applied to each.")
    stream: bool | None = Field(None, description="Answer as server-sent events, one per token.")


class TargetBody(StrictBody):
    """One of the tasks that answer a text."""

    task: str | None = Field(None, description="The task, or task@version; without it the frozen model answers.")


class GenerateManyBody(_AnsweredBody):
    """Body of /generate_many."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "Win a prize now!", "targets": [{"task": "sms_spam"}, {"task": "sms_spam@1"}, {}]},
                {
                    "inputs": "Win a prize now!",
                    "targets": [{"task": "sms_spam"}, {}],
                    "parameters": {"choices": ["ham", "spam"]},
                },
            ]
        }
    )

    inputs: Text = Field(description="The text; each task's input_template is applied to it.")
    targets: list[TargetBody] = Field(
        min_length=1, max_length=MAX_TARGETS, description="What answers the text, each at the same time."
    )
    answer_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, max_length=MAX_ANSWER_IDS, description="Tokens that the answer begins with; the model continues them."
    )

    @model_validator(mode="after")
    def _can_be_streamed(self) -> GenerateManyBody:
        parameters = self.parameters
        if parameters.adapter_id is not None:
            raise ValueError("parameters.adapter_id names one task; name the tasks in targets instead")
        whole = {"best_of": (parameters.best_of or 1) > 1, "decoder_input_details": parameters.decoder_input_details}
        whole["influence"] = parameters.influence
        for name, is_given in whole.items():
            if is_given:
                raise ValueError(f"parameters.{name} cannot be streamed; leave it out, or send it to /generate")
        for name in ("choices", "grammar"):
            if self.answer_ids and getattr(parameters, name) is not None:
                raise ValueError(f"parameters.{name} concerns a whole answer; leave out it or answer_ids")
        return self


class TokenBody(BaseModel):
    """One generated token. The generated text is the concatenation of all tokens that are not special."""

    id: int
    text: str
    logprob: float | None
    special: bool


class InputTokenBody(BaseModel):
    """One token of the input. The first token has no log-probability."""

    id: int
    text: str
    logprob: float | None


class SequenceDetails(BaseModel):
    """The details of a generated text."""

    finish_reason: str = Field(description="length, eos_token or stop_sequence.")
    generated_tokens: int
    seed: int | None = Field(description="The seed that was used, if tokens were sampled.")
    prefill: list[InputTokenBody] = Field([], description="The input's tokens, with decoder_input_details.")
    tokens: list[TokenBody] = []
    top_tokens: list[list[TokenBody]] | None = Field(None, description="With top_n_tokens.")


class SequenceBody(SequenceDetails):
    """One of several generated texts."""

    generated_text: str


class DetailsBody(SequenceDetails):
    """The `details` of a reply."""

    input_length: int = Field(description="Input tokens, without virtual ones.")
    prompt_tokens: int = Field(description="The same as input_length, by LoRAX's name.")
    virtual_tokens: int
    cached_tokens: int = Field(description="Virtual tokens whose keys and values were in the cache.")
    best_of_sequences: list[SequenceBody] | None = Field(None, description="With best_of: the others.")
    influence: Influence | None = Field(None, description="With influence: Δ log p of each output token.")


class ChoiceBody(BaseModel):
    """One of the texts to choose from."""

    text: str
    probability: float = Field(description="Probability of this text among the choices.")
    logprob: float = Field(description="Sum of its tokens' log-probabilities.")
    tokens: int = Field(description="Number of its tokens.")


class GenerateReply(BaseModel):
    """Reply of /generate."""

    generated_text: str
    details: DetailsBody | None = None
    choices: list[ChoiceBody] | None = Field(None, description="With `choices`, in their order.")


class TokenizeBody(StrictBody):
    """Body of /tokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Win a prize now!"}]})

    inputs: Text = Field(description="A text, without any template.")


class TokenizedBody(BaseModel):
    """One token of a text, and the range of characters that it covers."""

    id: int
    text: str
    start: int
    stop: int


_FIELDS = [*GenerateBody.model_fields, *(f"parameters.{name}" for name in GenerateParameters.model_fields)]
_FIELDS_OF_MANY = [*GenerateManyBody.model_fields, *(name for name in _FIELDS if "." in name)]


TGI_ERRORS = ErrorFormat(fields=lambda path: _FIELDS_OF_MANY if path == MANY else _FIELDS, union_fields=("inputs",))
