"""Converts the messages of a chat into the text that the model reads.

A message may have unknown fields: clients append replies of other servers and libraries to their history, and the extra
fields of such replies request nothing. Content other than text is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.api.openai.fields import NoList, NoText, NotOffered
from server.api.schemas import Text
from server.contracts import ChatEnd, TemplatedText
from server.engine.worker import EngineWorker
from server.errors import EmptyInput, InvalidRequest
from server.soft_prompts.manifest import Manifest

CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})
"""Fields that clients add to text parts as hints for prompt caching."""

SYSTEM_MESSAGE = "Prelude-System-Message"
"""Reply header: the chat's system message was ignored."""


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "\n".join(_text_of(part) for part in content)


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError('a part must be {"type": "text", "text": …}')
    if kind != "text":
        raise ValueError(f"parts of type {kind[:80]!r} are not supported: the model reads text only")
    text = part.get("text")
    given = {name for name, value in part.items() if value is not None}
    if not isinstance(text, str) or given - CACHE_HINTS != {"type", "text"}:
        raise ValueError('a part of type text must have a "text" and nothing else')
    return text


def _plain(part: Any) -> Any:
    """A text part without extra fields such as annotations."""
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return {name: part[name] for name in ("type", "text") if name in part} if is_text else part


Content = Annotated[Text, BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, str]])]


class Message(BaseModel):
    """One message.

    The `message` of a reply of this server can be sent back unchanged. Unknown fields have no effect.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(
        description='A text, or a list of {"type": "text", "text": …}; null, of the assistant, is an empty text.'
    )
    name: Text | None = Field(None, max_length=64, description="The speaker's name, for templates that use it.")
    audio: NotOffered = None
    function_call: NotOffered = None
    refusal: NoText = None
    tool_calls: NoList = None

    @model_validator(mode="before")
    @classmethod
    def _an_answer_may_be_empty_and_annotated(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        content = value.get("content")
        if content is None:
            return {**value, "content": ""}
        return {**value, "content": [_plain(part) for part in content]} if isinstance(content, list) else value


@dataclass(frozen=True)
class ChatText:
    """The text of a chat for the model, and reply headers that report how the messages were read.

    A chat template writes special tokens itself; otherwise the tokenizer adds them (`add_special_tokens`).
    """

    text: TemplatedText
    add_special_tokens: bool
    headers: dict[str, str]


def chat_text(
    worker: EngineWorker, manifest: Manifest, messages: Sequence[Message], end: ChatEnd = ChatEnd.ANSWER
) -> ChatText:
    """Render a chat as text, up to its `end`.

    A task with an `input_template` was trained on single inputs, so it takes one user message and applies only that
    template. All other tasks use the model's chat template. The manifest's `system_message` determines how system
    messages are handled.

    Raises:
        InvalidRequest: the task or the model does not support these messages or this `end`.
        EmptyInput: the task's only message, or the message to continue, is empty.
    """
    if end is not ChatEnd.ANSWER:
        _check_end(end, messages, manifest)
    # developer is OpenAI's newer name for what templates call system.
    turns = [("system" if message.role == "developer" else message.role, message) for message in messages]
    system = [message.content for role, message in turns if role == "system" and message.content]
    if system and manifest.on_system_message == "refuse":
        raise InvalidRequest(
            "This task refuses system messages: its manifest says so.",
            remedy="Send the message of the user alone, or ask the frozen model.",
            param="messages",
        )
    ignored = manifest.on_system_message == "ignore"
    headers = {SYSTEM_MESSAGE: "ignored"} if system and ignored else {}
    if manifest.input_template is None:
        kept = [_turn(role, message) for role, message in turns if not ignored or role != "system"]
        if not kept:
            raise _without_a_user("This task ignores system messages, and there is no other.")
        return ChatText(worker.text.render_chat(kept, end), False, headers)
    others = [message for role, message in turns if role != "system"]
    if [message.role for message in others] != ["user"]:
        raise _without_a_user(
            "This task has an input_template, which takes one message of the user and no earlier turns; "
            f"there are {len(others)} messages beside system messages."
        )
    if not others[0].content:
        raise EmptyInput("The message is empty.", remedy="Send at least one character.", param="messages")
    return ChatText(manifest.render(others[0].content, "\n\n".join(system)), True, headers)


def _check_end(end: ChatEnd, messages: Sequence[Message], manifest: Manifest) -> None:
    """Refuse a chat that does not support this `end`."""
    if manifest.input_template is not None:
        raise InvalidRequest(
            "This task has an input_template, which takes one message of the user. It has no message to continue, and "
            "no start of an answer to leave out.",
            remedy="Leave out continue_final_message and add_generation_prompt, or ask a task without input_template.",
            param="continue_final_message" if end is ChatEnd.CONTINUE else "add_generation_prompt",
        )
    if end is not ChatEnd.CONTINUE:
        return
    last = messages[-1]
    if not last.content.strip():
        raise EmptyInput(
            "The last message is empty, so there is nothing to continue.",
            remedy="Send the beginning of an answer in it, or leave out continue_final_message.",
            param="messages",
        )
    if last.role in ("system", "developer") and manifest.on_system_message == "ignore":
        raise InvalidRequest(
            "This task ignores system messages, and the message to be continued is one.",
            remedy="End the messages with one of the assistant.",
            param="messages",
        )


def _turn(role: str, message: Message) -> dict[str, str]:
    turn = {"role": role, "content": message.content}
    return turn if message.name is None else {**turn, "name": message.name}


def _without_a_user(problem: str) -> InvalidRequest:
    return InvalidRequest(
        problem,
        remedy="Send one message of the user, or ask a task without input_template or the frozen model.",
        param="messages",
    )
