"""Log-probabilities in OpenAI's two forms.

Every generated token is reported, including the token that ended the text, so their number equals the usage count. The
text of a token that is only a part of a character is U+FFFD; a chat's `bytes` are exact.
"""

from collections.abc import Sequence
from typing import Any

from server.contracts import Candidate, Scored, Token
from server.engine.text.token_texts import TokenTexts

LOWEST = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""

_REPLACEMENT = "\ufffd".encode()


def completion_logprobs(
    words: TokenTexts, tokens: Sequence[Token | Scored], offsets: Sequence[int], top: int
) -> dict[str, Any]:
    """`logprobs` of one choice of a completion.

    `offsets` are the tokens' beginnings in the text, in characters; `top` likely tokens are reported beside each.
    """
    return {
        "tokens": [words.text_of(token.id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_text(words, token, top) for token in tokens],
        "text_offset": list(offsets),
    }


def chat_logprobs(words: TokenTexts, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """`logprobs` of one choice of a chat."""
    content = []
    for token in tokens:
        others = [_entry(words, candidate.id, candidate.logprob) for candidate in token.top[:top]]
        content.append({**_entry(words, token.id, token.logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def prompt_logprobs(words: TokenTexts, given: Sequence[Scored], top: int | None) -> dict[str, Any]:
    """vLLM's field `prompt_logprobs`; no field if `top` is None.

    Null for the first token; then, by their ids, the token itself and the `top` most likely tokens.
    """
    if top is None:
        return {}
    return {"prompt_logprobs": [None if token.logprob is None else _by_id(words, token, top) for token in given]}


def text_offsets(text: str, pieces: Sequence[bytes]) -> list[int]:
    """The offsets, in characters, at which the tokens of a text begin; a token may begin within a character.

    Tokens that the text does not show, such as a BOS, have no width; nor has a space before the first word.
    """
    data = text.encode()
    at = characters = counted = 0
    offsets = []
    for piece in pieces:
        while data.startswith(_REPLACEMENT, at) and not data.startswith(piece, at):
            at += len(_REPLACEMENT)  # bytes of earlier tokens that formed no character
        characters += sum(byte & 0xC0 != 0x80 for byte in data[counted:at])
        counted = at
        inside = at < len(data) and data[at] & 0xC0 == 0x80
        offsets.append(characters - inside)
        if data.startswith(piece, at):
            at += len(piece)
        elif data.startswith(piece.removeprefix(b" "), at):
            at += len(piece) - 1
    return offsets


def _by_text(words: TokenTexts, token: Token | Scored, top: int) -> dict[str, float] | None:
    """Log-probabilities by token text; of two tokens with the same text, the likelier one is reported."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for candidate in (*token.top[:top], Candidate(token.id, token.logprob)):
        found.setdefault(words.text_of(candidate.id), _finite(candidate.logprob))
    return found


def _by_id(words: TokenTexts, token: Scored, top: int) -> dict[str, Any]:
    assert token.logprob is not None, "it has something before it"
    ranked = [(candidate, rank) for rank, candidate in enumerate(token.top[:top], 1)]
    return {
        str(candidate.id): {
            "logprob": _finite(candidate.logprob),
            "rank": rank,
            "decoded_token": words.text_of(candidate.id),
        }
        for candidate, rank in [*ranked, (Candidate(token.id, token.logprob), token.rank)]
    }


def _entry(words: TokenTexts, token_id: int, logprob: float | None) -> dict[str, Any]:
    assert logprob is not None, "log-probabilities were asked for"
    return {"token": words.text_of(token_id), "logprob": _finite(logprob), "bytes": list(words.bytes_of(token_id))}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
