"""Renders a chat with the model's template, and finds the parts of the result that are messages.

A chat template is a program that may do anything with a message, so it runs twice. In the second run each message is
replaced by a secret name. Text around the names is the template's own; the names mark the positions of the messages.
"""

import re
import secrets
from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from server.contracts import ChatEnd, TemplatedText
from server.engine.text.length_bound import LengthBound
from server.engine.text.special_tokens import InputEncoder
from server.errors import InvalidRequest

LEFT, RIGHT = "\u2003", "\u2002"
"""White space around a name, which shows whether the template strips the message."""
MESSAGE_FIELDS = ("content", "name")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    encoder: InputEncoder | None = None,
    length_bound: LengthBound | None = None,
    end: ChatEnd = ChatEnd.ANSWER,
) -> TemplatedText:
    """Render a conversation with the model's chat template, up to `end`.

    The template writes the BOS that the model needs, so the text must be tokenised without adding one.

    Args:
        messages: each has `role` and `content`, and optionally `name`.
        encoder: tells the template's control tokens from those in messages; if None, all are the template's.
        length_bound: a text that can never fit is not searched for control tokens.

    Raises:
        InvalidRequest: the model has no chat template, its template is broken, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "This model has no chat template.",
            remedy="Use /v1/completions or /generate, or ask a task whose input_template takes one message.",
        )
    text = _render(tokenizer, messages, end)
    if encoder is None:
        return TemplatedText(text)
    name = f"{secrets.randbelow(10**32):032d}"
    written = [message[field] for message in messages for field in MESSAGE_FIELDS if message.get(field)]
    try:
        skeleton = _render(tokenizer, _named(messages, name), end)
    except InvalidRequest:
        if any(encoder.control_ids(content) for content in written):
            raise InvalidRequest(
                "The messages hold a special token of the model, and its chat template does not show where they stand.",
                remedy="Leave it out, or let the server's operator set PRELUDE_SPECIAL_TOKENS_IN_INPUT=control.",
                param="messages",
            ) from None
        return TemplatedText(text)
    expected = _filled(skeleton, name, written)
    if expected.text == text or (length_bound is not None and not length_bound.can_fit(text)):
        return expected
    # The template depends on the messages' content. If they added no special token, its text is used; otherwise the
    # text that it writes for the secret names.
    same = encoder.control_ids(text) == encoder.control_ids(skeleton)
    return TemplatedText(text) if same else expected


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], end: ChatEnd) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=end is ChatEnd.ANSWER,
            continue_final_message=end is ChatEnd.CONTINUE,
        )
    except TemplateSyntaxError as exc:
        raise InvalidRequest(
            f"The model's chat template is broken: {str(exc)[:200].rstrip('.')}.",
            remedy="Mend the chat template in the model's directory, and restart; meanwhile use /v1/completions.",
        ) from exc
    except Exception as exc:  # a template is a program and may raise any exception
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {str(exc)[:200].rstrip('.')}.",
            remedy="Send roles in the order that the model knows; if it refuses all, mend the model's chat template.",
        ) from exc
    assert isinstance(rendered, str), "one conversation, not tokenised, is one text"
    return rendered


def _named(messages: Sequence[Mapping[str, str]], name: str) -> list[dict[str, str]]:
    """The messages with their texts replaced by numbered names; empty texts stay empty."""
    named, count = [], 0
    for message in messages:
        changed = dict(message)
        for field in MESSAGE_FIELDS:
            if message.get(field):
                changed[field] = f"{LEFT}{name}{count:08d}{RIGHT}"
                count += 1
        named.append(changed)
    return named


def _filled(skeleton: str, name: str, written: Sequence[str]) -> TemplatedText:
    """Replace the names in the skeleton by the messages' texts, stripped where the template stripped the names."""
    pieces = re.split(f"({LEFT}?){name}([0-9]{{8}})({RIGHT}?)", skeleton)
    parts = [(pieces[0], False)]
    for at in range(1, len(pieces), 4):
        left, number, right, after = pieces[at : at + 4]
        content = written[int(number)]
        content = content if left else content.lstrip()
        parts += [(content if right else content.rstrip(), True), (after, False)]
    return TemplatedText.of(*parts)
