"""Encodes texts so that special tokens in a user's text stay plain text.

A tokenizer turns the string of a special token into its id wherever it occurs, so a user who writes `<|im_end|>` could
end the turn and begin a system message. A template's own text may contain such tokens; users' texts in it may not.
"""

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

from tokenizers import AddedToken, Encoding, Tokenizer

from server.contracts import TemplatedText
from server.errors import InvalidRequest

Found: TypeAlias = tuple[int, int, int]
"""A control token: its id, and the start and end of its characters."""

MOST_CUTS = 4
"""Maximum number of times that a text is cut because the vocabulary itself produces a control token."""
KNOWN_PARTS = 512
"""Number of template parts whose control tokens are cached."""

_ADDED = '"added_tokens":'
"""Before the list of added tokens in a tokenizer's JSON; in a string its quotes would be escaped."""

_BRACKETED = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)


class InputEncoder:
    """An encoder that never turns a user's text into control tokens; safe from any thread.

    Control tokens are added tokens that are marked as special, and added tokens in brackets (`<tool_call>`). Added
    white space, words and single characters are not control tokens, because ordinary text contains them.

    A user's text without control tokens gets exactly the tokenizer's ids. Otherwise a second tokenizer, which treats
    the strings of control tokens as plain text, encodes the whole text. The template's own tokens have secret names in
    it, so the text is still encoded in one piece, with the same merges and spaces.
    """

    def __init__(self, backend: Tokenizer, *, unknown_id: int | None = None) -> None:
        """Copy the tokenizer of raw texts, which must not change any more; `unknown_id` is its unknown token."""
        self._backend, self._unknown_id = backend, unknown_id
        added = backend.get_added_tokens_decoder()
        self._contents = {token_id: token.content for token_id, token in added.items() if _is_control(token)}
        self._plain = _reading_as_text(backend, {*self._contents.values()})
        self._names = names = {token_id: _secret() for token_id in self._contents}
        self._cut = _secret()
        named = [_named(name, like=added[token_id]) for token_id, name in names.items()]
        self._plain.add_tokens([*named, AddedToken(self._cut, normalized=False, special=False)])
        self._cut_id = self._plain.token_to_id(self._cut)
        self._meant = {self._plain.token_to_id(name): token_id for token_id, name in names.items()}
        self._own_tokens = lru_cache(KNOWN_PARTS)(self._controls_of)

    def encode(self, text: str | TemplatedText, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without control tokens from users' texts; a plain `str` may contain special tokens.

        `add_special_tokens` is False for a text that contains its special tokens, such as a rendered chat. Raises
        InvalidRequest if a user's text cannot be distinguished from a special token.
        """
        raw = text if isinstance(text, str) else text.text
        if isinstance(text, str) or not text.user_spans or not self._contents:
            [encoding] = self._backend.encode_batch_fast([raw], add_special_tokens=add_special_tokens)
            raw_ids: list[int] = encoding.ids
            return raw_ids
        # The batch methods let other threads run; only the slower one returns offsets.
        [encoding] = self._backend.encode_batch([raw], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        found = list(self._found(encoding, raw))
        if [token_id for token_id, _, _ in found] == [token_id for token_id, _, _ in self._of_template(text)]:
            starts = [start for start, _ in text.user_spans]
            if not any(_touches(text, starts, start, stop) for _, start, stop in found):
                return ids
        return self._encode_as_text(text, add_special_tokens)

    def control_ids(self, text: str) -> list[int]:
        """The control tokens in a text, in order, as if no part of it were a user's."""
        return [token_id for token_id, _, _ in self._controls_of(text)]

    def _encode_as_text(self, text: TemplatedText, add_special_tokens: bool) -> list[int]:
        own = list(self._of_template(text))
        parts, at = [], 0
        for token_id, start, stop in own:
            parts += [text.text[at:start], self._names[token_id]]
            at = stop
        marked = "".join([*parts, text.text[at:]])
        for _ in range(MOST_CUTS):
            [encoding] = self._plain.encode_batch([marked], add_special_tokens=add_special_tokens)
            bad = [found for found in self._found(encoding, marked) if found[2] - found[1] > 1]
            if not bad:
                break
            # A unigram vocabulary may still choose a control token; cutting the text there prevents it.
            ends = [0, *(cut for found in bad for cut in self._cuts(marked, found)), len(marked)]
            marked = self._cut.join(marked[a:b] for a, b in pairwise(ends))
        ids = [self._meant.get(token_id, token_id) for token_id in encoding.ids if token_id != self._cut_id]
        passed = [self._meant[token_id] for token_id in encoding.ids if token_id in self._meant]
        if bad or passed != [token_id for token_id, _, _ in own]:
            raise InvalidRequest(
                "The text holds a special token of the model that cannot be read as text.",
                remedy="Leave it out, or let the server's operator set PRELUDE_SPECIAL_TOKENS_IN_INPUT=control.",
            )
        return ids

    def _cuts(self, text: str, found: Found) -> list[int]:
        """Positions at which to cut a text so that it no longer contains a token: within each occurrence of its string.

        An unknown token also covers the unknown characters around an occurrence.
        """
        token_id, start, stop = found
        spelt = re.finditer(re.escape(self._contents[token_id]), text[start:stop])
        return [start + match.start() + 1 for match in spelt] or [start + 1]

    def _of_template(self, text: TemplatedText) -> Iterator[Found]:
        """The control tokens of a template's own parts, each encoded alone, so that users' texts do not change them."""
        at = 0
        for start, stop in (*text.user_spans, (len(text.text), len(text.text))):
            if start > at:
                for token_id, first, last in self._own_tokens(text.text[at:start]):
                    yield token_id, at + first, at + last
            at = stop

    def _controls_of(self, text: str) -> tuple[Found, ...]:
        [encoding] = self._backend.encode_batch([text], add_special_tokens=False)
        return tuple(self._found(encoding, text))

    def _found(self, encoding: Encoding, text: str) -> Iterator[Found]:
        """The control tokens that cover characters of the text, without the white space that some of them absorb."""
        ids: list[int] = encoding.ids
        if self._contents.keys().isdisjoint(ids):
            return
        rows = zip(ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
        for token_id, (start, stop), is_frame in rows:
            if is_frame or token_id not in self._contents:
                continue
            piece = text[start:stop]
            if token_id == self._unknown_id and self._contents[token_id] not in piece:
                continue
            first = start + len(piece) - len(piece.lstrip())
            yield token_id, first, max(first, start + len(piece.rstrip()))


def _is_control(token: AddedToken) -> bool:
    content = token.content.strip()
    return len(content) > 1 and (token.special or _BRACKETED.fullmatch(content) is not None)


def _touches(text: TemplatedText, starts: list[int], start: int, stop: int) -> bool:
    """Whether any of these characters belong to a user's text."""
    before = bisect_left(starts, stop) - 1
    return before >= 0 and text.user_spans[before][1] > start


def _secret() -> str:
    """An unguessable name that normalisation does not change."""
    return f"{secrets.randbelow(10**40):040d}"


def _named(name: str, like: AddedToken) -> AddedToken:
    return AddedToken(name, lstrip=like.lstrip, rstrip=like.rstrip, normalized=like.normalized, special=False)


def _reading_as_text(backend: Tokenizer, contents: Collection[str]) -> Tokenizer:
    """A copy of the tokenizer that does not recognise these tokens in a text."""
    text = backend.to_str()
    # Only this list is parsed: with vocabulary and merges, Python would make a hundred thousand objects.
    start = text.index(_ADDED) + len(_ADDED)
    tokens, end = json.JSONDecoder().raw_decode(text, start)
    for token in tokens:
        token["special"] = token["content"] in contents
    copy = Tokenizer.from_str(text[:start] + json.dumps(tokens) + text[end:])
    copy.encode_special_tokens = True
    return copy
