"""The parts that completion and chat replies share, and the models that describe both in /openapi.json."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.api.outputs import Choice

ReasonToFinish = Literal["stop", "length"]


class CachedTokens(BaseModel):
    """`prompt_tokens_details`."""

    cached_tokens: int = Field(description="Virtual tokens whose keys and values were cached.")


class UsageBody(BaseModel):
    """Token counts of a whole request."""

    prompt_tokens: int = Field(description="Virtual tokens and input tokens of all inputs.")
    completion_tokens: int = Field(description="Generated tokens, including those of texts that best_of left out.")
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Lists with one item per token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed input.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where in the text a token begins, in characters.")


class PromptToken(BaseModel):
    """A candidate token at a position of the input."""

    logprob: float
    rank: int = Field(description="How many tokens were as likely or likelier, itself included.")
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptToken] | None] | None,
    Field(description="With prompt_logprobs: for each input token but the first, tokens at its position, by id."),
]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: ReasonToFinish
    prompt_logprobs: PromptLogprobs = None


class _Reply(BaseModel):
    id: str
    created: int
    model: str = Field(description="As in the request; the header Prelude-Version has the version that answered.")
    system_fingerprint: str = Field(description="Changes with the frozen model and with the content of the version.")
    usage: UsageBody


class CompletionReply(_Reply):
    """Reply of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatToken(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] = Field(description="UTF-8; a token may be a part of a character.")


class ChatTokenWithOthers(ChatToken):
    """A generated token."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message."""

    content: list[ChatTokenWithOthers]
    refusal: None


class ReplyMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One choice of a chat."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: ReasonToFinish


class ChatReply(_Reply):
    """Reply of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs = None


def usage_of(requests: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """Token counts of requests that have ended. The choices of a request share its input, which counts once."""
    given = cached = generated = 0
    for choices in requests:
        usages = [choice.usage for choice in choices if choice.usage is not None]
        assert usages, "the last delta of a choice carries its usage"
        given += usages[0].virtual_tokens + usages[0].input_tokens
        cached += min(usage.cached_tokens for usage in usages)  # one choice may have computed the prefix for the others
        generated += sum(usage.output_tokens for usage in usages)
    return {
        "prompt_tokens": given,
        "completion_tokens": generated,
        "total_tokens": given + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
