"""Bodies of requests and replies. Unknown fields are errors: a misspelt option must not silently do nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SHARES = "Shares of 100 by version, in a canary."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class GenerateParameters(_Strict):
    """Parameters by text-generation-inference's names; those that are null take the task's default, then greedy."""

    adapter_id: str | None = Field(None, description="The task; the same as ?task=.")
    do_sample: bool | None = Field(None, description="false is greedy; true samples at temperature 1 unless given.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; 128 unless the task says else."
    )
    min_new_tokens: int | None = Field(None, ge=0, description="No end-of-sequence token before so many tokens.")
    temperature: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="0 is greedy; anything else samples."
    )
    top_k: int | None = Field(None, ge=1, description="Sample from the k most likely tokens.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample from the smallest set that reaches p.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="Over 1 makes tokens that occurred less likely."
    )
    seed: int | None = Field(None, ge=0, lt=2**64, description="Makes sampling repeatable.")
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, max_length=16, description="The text ends before the first of these."
    )
    ignore_eos_token: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    truncate: int | None = Field(None, ge=1, description="Keep only the last so many input tokens.")
    return_full_text: bool | None = Field(None, description="Put `inputs` in front of the generated text.")
    details: bool | None = Field(None, description="Answer finish reason, token counts and every token.")
    best_of: int | None = Field(None, description="Only 1.")
    decoder_input_details: bool | None = Field(None, description="Only false.")
    frequency_penalty: float | None = Field(None, description="Only 0.")
    grammar: dict[str, Any] | None = Field(None, description="Not offered.")
    top_n_tokens: int | None = Field(None, description="Only 0.")
    typical_p: float | None = Field(None, description="Only 1.")
    watermark: bool | None = Field(None, description="Only false.")

    @model_validator(mode="after")
    def _refuse_what_is_not_offered(self) -> GenerateParameters:
        neutral = {
            "best_of": 1,
            "decoder_input_details": False,
            "frequency_penalty": 0,
            "grammar": None,
            "top_n_tokens": 0,
            "typical_p": 1,
            "watermark": False,
        }
        for name, value in neutral.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} is not offered by this version of the server; leave it out")
        return self


class GenerateBody(_Strict):
    """Body of /generate, /generate_stream and /."""

    inputs: str = Field(description="The text; the task's input_template is put around it.")
    parameters: GenerateParameters = Field(default_factory=GenerateParameters)
    stream: bool = Field(False, description="Answer as server-sent events, one per token.")
    user: str | None = Field(None, max_length=512, description="Who asks; in a canary one user stays on one side.")

    @field_validator("parameters", mode="before")
    @classmethod
    def _null_is_default(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("inputs")
    @classmethod
    def _is_text(cls, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise ValueError("holds half of a surrogate pair, which is not text") from exc
        return value


class TokenBody(BaseModel):
    """One generated token. Joined, the texts of those that are not special are the generated text."""

    id: int
    text: str
    logprob: float | None
    special: bool


class DetailsBody(BaseModel):
    """What `details: true` adds."""

    finish_reason: str = Field(description="length, eos_token or stop_sequence.")
    generated_tokens: int
    input_length: int = Field(description="Input tokens, without virtual ones.")
    virtual_tokens: int
    seed: int | None = Field(description="The seed that was used, if tokens were sampled.")
    prefill: list[TokenBody] = []
    tokens: list[TokenBody] = []


class GenerateReply(BaseModel):
    """Reply of /generate."""

    generated_text: str
    details: DetailsBody | None = None


class ErrorBody(BaseModel):
    """Every error: what was wrong, its kind in text-generation-inference's words, its code, and what to do."""

    error: str
    error_type: str
    code: str
    remedy: str


class TaskVersion(BaseModel):
    """A task and one of its versions."""

    task: str
    version: int


class PromptSummary(BaseModel):
    """One entry of GET /prompts; without a `version` nobody answers. In a canary it is the one that answers most."""

    task: str
    version: int | None = None
    traffic: dict[int, int] | None = Field(None, description=SHARES)
    digest: str | None = None
    peft_type: str | None = None
    num_virtual_tokens: int | None = None
    description: str | None = None
    error: str | None = None


class PromptList(BaseModel):
    """A page of tasks; `next` is the `after` of the following page."""

    prompts: list[PromptSummary]
    next: str | None = None


class PromptDetail(PromptSummary):
    """GET /prompts/{task}."""

    versions: list[int]
    manifest: dict[str, Any] = Field(description="What the live version says about itself; else the newest one.")


class VersionBody(BaseModel):
    """One version of a task."""

    version: int
    live: bool = Field(description="Whether it answers requests that name no version, all of them or a share.")
    digest: str = Field(description="Identity of what changes answers.")
    prefix_hash: str = Field(description="Identity of the numbers alone.")
    peft_type: str
    num_virtual_tokens: int
    bytes: int
    created_at: str
    source: str = Field(description="api or inbox.")
    by: str | None = Field(None, description="Id of the key, or place of the inbox, that it came from.")
    description: str | None = None
    metrics: dict[str, Any] | None = None


class VersionList(BaseModel):
    """A task's versions, newest first, and who answers."""

    task: str
    live: int | None = Field(None, description="The version that answers; in a canary the one that answers most.")
    traffic: dict[int, int] | None = Field(None, description=SHARES)
    versions: list[VersionBody]


class ActivateBody(BaseModel):
    """POST /prompts/{task}/activate."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1, strict=True)


class PublishReply(BaseModel):
    """PUT /prompts/{task}. A multitask soft prompt makes several tasks; the fields then describe the first."""

    task: str
    version: int
    digest: str
    peft_type: str
    num_virtual_tokens: int
    live: bool
    tasks: list[TaskVersion]


class Health(BaseModel):
    """/health and /ready."""

    status: str


class PrefixInfo(BaseModel):
    """How often requests found their soft prompt's prefix computed, since the server started."""

    hits: int = Field(description="Requests that found it, or waited for another one that computed it.")
    misses: int = Field(description="Requests that had to compute it; each publish makes one.")
    budget_bytes: int = Field(description="Memory that prefixes may take.")


class Info(BaseModel):
    """/info."""

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
