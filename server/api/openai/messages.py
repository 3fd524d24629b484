"""The messages of a chat, and the text that the model reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.api.openai.fields import NotOffered
from server.api.schemas import Text
from server.engine.worker import EngineWorker
from server.errors import EmptyInput, InvalidRequest
from server.soft_prompts.manifest import Manifest


def _joined(content: Any) -> Any:
    """A list of text parts as one text, a line each."""
    if not isinstance(content, list):
        return content
    return "\n".join(_text_of(part) for part in content)


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError('a part must be {"type": "text", "text": …}')
    if kind != "text":
        raise ValueError(f"parts of type {kind[:80]!r} are not offered: the model reads text only")
    text = part.get("text")
    if not isinstance(text, str) or set(part) != {"type", "text"}:
        raise ValueError('a part of type text must have a "text" and nothing else')
    return text


Content = Annotated[Text, BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, str]])]


class Message(BaseModel):
    """One message; what a reply of this server holds may be sent back as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(description='A text, or a list of {"type": "text", "text": …}.')
    name: Text | None = Field(None, max_length=64, description="Who speaks, for templates that tell it.")
    annotations: NotOffered = None
    audio: NotOffered = None
    function_call: NotOffered = None
    refusal: NotOffered = None
    tool_calls: NotOffered = None


def chat_text(worker: EngineWorker, manifest: Manifest, messages: Sequence[Message]) -> tuple[str, bool]:
    """The text that a chat comes to, and whether the tokenizer is to add its special tokens.

    A task that brings an `input_template` was trained on single inputs in it, so it takes one message and no other
    template; elsewhere the model's own chat template is used, which writes BOS itself.

    Raises:
        InvalidRequest: the task takes one message, or the model has no template, or refuses these messages.
        EmptyInput: the one message is empty.
    """
    if manifest.input_template is None:
        # OpenAI's newer name for what templates call system.
        roles = [("system" if message.role == "developer" else message.role) for message in messages]
        turns = [{"role": role, "content": m.content} for role, m in zip(roles, messages, strict=True)]
        for turn, message in zip(turns, messages, strict=True):
            if message.name is not None:
                turn["name"] = message.name
        return worker.text.render_chat(turns), False
    *before, last = messages
    if before or last.role != "user":
        raise InvalidRequest(
            "This task has an input_template, which takes one message of the user, no system message or earlier turns.",
            remedy="Send the one message, or ask a task without input_template or the frozen model.",
            param="messages",
        )
    if not last.content:
        raise EmptyInput("The message is empty.", remedy="Send at least one character.", param="messages")
    return manifest.render(last.content), True
