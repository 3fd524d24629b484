"""The text and the bytes of single tokens.

`detokenizer.py` makes text of a sequence as it grows. Here every token stands by itself: in a byte-level vocabulary it
may be a third of a character, so its bytes are what is exact, and its text is for people.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from server.engine.text.tokenizer_parts import byte_level_alphabet, parts_of

REPLACEMENT = "\ufffd"
"""Stands for bytes that form no character."""

META_SPACE = "▁"
"""How SentencePiece writes a space."""
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The vocabulary, read one token at a time; safe from any thread.

    Attributes:
        backend: the tokenizer's Rust part.
        special_ids: tokens that are none of the text: those that the tokenizer marks as special, and `special_ids`.
        is_byte_level: whether a text is its tokens' `decoded_bytes_of` in UTF-8, and nothing else.
    """

    def __init__(self, backend: Tokenizer, special_ids: Collection[int] = ()) -> None:
        """Find out how this tokenizer's decoder writes bytes."""
        self.backend = backend
        self._kinds = frozenset(part["type"] for part in parts_of(backend.decoder))
        self._byte_of = byte_level_alphabet()
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(special_ids) | {token_id for token_id, token in added.items() if token.special}
        self._texts: dict[int, str] = {}
        self._own_texts: dict[int, str | None] = {}
        self.is_byte_level = self._kinds == {"ByteLevel"}

    @cached_property
    def primer(self) -> tuple[int, ...]:
        """Tokens of a text that generated ones are decoded after, so that they keep a space that they begin with.

        Decoders of SentencePiece's kind take the first space of a text away, and every other one is none of the first.
        """
        for text in "a0.\n":
            ids = tuple(self._encode(text))
            if ids and self.special_ids.isdisjoint(ids) and self.decode(ids) == text:
                return ids
        return ()

    @cached_property
    def puts_space_first(self) -> bool:
        """Whether the tokenizer puts a space before a text that it encodes, which its decoder takes away."""
        before = self.decode(self.primer)
        return bool(self.primer) and self.decode(self.primer * 2).removeprefix(before) == f" {before}"

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a sequence, special tokens by their names."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def encode_after_text(self, text: str) -> list[int]:
        """Token ids of a text that continues another: without the space that the tokenizer puts before a first one."""
        whole = self._encode(text)
        for before in ("\n", "a") if self.puts_space_first else ():
            first, both = self._encode(before), self._encode(before + text)
            if both[: len(first)] == first:
                return both[len(first) :]
        return whole

    def _encode(self, text: str) -> list[int]:
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=False)  # lets other threads run
        ids: list[int] = encoding.ids
        return ids

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text, in UTF-8 or a part of it; nothing for a row that no token belongs to."""
        token = self._added.get(token_id)
        if token is not None:  # as it is: it went through no byte-level alphabet
            return token.encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._kinds:
            # A few vocabularies have entries beside the alphabet; they mean themselves.
            return b"".join(self._byte_of.get(character) or character.encode() for character in token)
        match = _FALLBACK_BYTE.fullmatch(token) if "ByteFallback" in self._kinds else None
        return bytes.fromhex(match[1]) if match else token.replace(META_SPACE, " ").encode()

    def decoded_bytes_of(self, token_id: int) -> bytes:
        """What a byte-level decoder makes of a token; unlike `bytes_of`, it reads added tokens in its alphabet too."""
        token = self.backend.id_to_token(token_id) or ""
        known = [self._byte_of.get(character) for character in token]
        return token.encode() if None in known else b"".join(filter(None, known))

    def text_of(self, token_id: int) -> str:
        """A token as text; bytes that are no character are U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.bytes_of(token_id).decode("utf-8", "replace")
        return text

    def own_text_of(self, token_id: int) -> str | None:
        """What a token adds to any text that ends in a whole character; None where that depends on its neighbours.

        A decoder that does nothing but turn GPT-2's alphabet into bytes reads each token by itself.
        """
        try:
            return self._own_texts[token_id]
        except KeyError:
            text = self._own_texts[token_id] = self._find_own_text(token_id)
            return text

    def _find_own_text(self, token_id: int) -> str | None:
        token = self.backend.id_to_token(token_id)
        if not self.is_byte_level or token_id in self._added or not token or not set(token) <= self._byte_of.keys():
            return None
        try:
            text = self.bytes_of(token_id).decode()
        except UnicodeDecodeError:
            return None
        return None if REPLACEMENT in text else text
