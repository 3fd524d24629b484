"""The text and bytes of single tokens.

`detokenizer.py` decodes a growing sequence; this module decodes each token by itself. In a byte-level vocabulary a
token may be a third of a character, so only its bytes are exact; its text is for people.
"""

import re
from collections.abc import Collection, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from server.engine.text.tokenizer_parts import byte_level_alphabet, parts_of

REPLACEMENT = "\ufffd"
"""Replaces bytes that form no character."""

META_SPACE = "▁"
"""SentencePiece's symbol for a space."""
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The texts of a vocabulary's single tokens; safe from any thread.

    Attributes:
        backend: the tokenizer's Rust part.
        special_ids: tokens that are no part of the text: the given ids, and those that the tokenizer marks as special.
        is_byte_level: whether a text is exactly its tokens' `decoded_bytes_of`, in UTF-8.
    """

    def __init__(self, backend: Tokenizer, special_ids: Collection[int] = ()) -> None:
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
        """Tokens to decode before generated tokens, so that a leading space of the generated text is kept.

        SentencePiece-like decoders remove the first space of a text, and only that one.
        """
        for text in "a0.\n":
            ids = tuple(self._encode(text))
            if ids and self.special_ids.isdisjoint(ids) and self.decode(ids) == text:
                return ids
        return ()

    @cached_property
    def puts_space_first(self) -> bool:
        """Whether the tokenizer adds a space before a text when encoding, which its decoder removes."""
        before = self.decode(self.primer)
        return bool(self.primer) and self.decode(self.primer * 2).removeprefix(before) == f" {before}"

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a sequence, including the names of special tokens."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def encode_after_text(self, text: str) -> list[int]:
        """Token ids of a text that continues another text, without the space that the tokenizer adds at the start."""
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
        """The bytes that a token adds to the text, in UTF-8; empty for an id without a token."""
        token = self._added.get(token_id)
        if token is not None:  # unchanged, because added tokens do not use the byte-level alphabet
            return token.encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._kinds:
            # A few vocabularies have characters outside the alphabet, which stand for themselves.
            return b"".join(self._byte_of.get(character) or character.encode() for character in token)
        match = _FALLBACK_BYTE.fullmatch(token) if "ByteFallback" in self._kinds else None
        return bytes.fromhex(match[1]) if match else token.replace(META_SPACE, " ").encode()

    def decoded_bytes_of(self, token_id: int) -> bytes:
        """The bytes that a byte-level decoder gives a token; unlike `bytes_of`, also for added tokens."""
        token = self.backend.id_to_token(token_id) or ""
        known = [self._byte_of.get(character) for character in token]
        return token.encode() if None in known else b"".join(filter(None, known))

    def text_of(self, token_id: int) -> str:
        """A token as text; bytes that form no character become U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.bytes_of(token_id).decode("utf-8", "replace")
        return text

    def own_text_of(self, token_id: int) -> str | None:
        """The text that a token adds after complete characters; None if this depends on its neighbours.

        A decoder that only converts GPT-2's alphabet to bytes decodes each token by itself.
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
