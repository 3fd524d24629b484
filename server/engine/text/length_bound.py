"""A lower bound on the tokens of a text, found from its bytes alone.

To tokenise a text takes a hundred bytes of memory for each token and lets no other thread run. So a text that can never
fit the context is refused, or cut, before it is tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import BPE

from server.contracts import TemplatedText
from server.engine.text.tokenizer_parts import byte_level_alphabet, parts_of

PIECE = 2**14
"""Characters that are looked at in one go."""
KEEP_ASCII = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave a text of ASCII as it is."""
WHITE_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001)))).encode()
"""Every byte of a white-space character, in UTF-8."""
ROUNDING = 1e-6


class LengthBound:
    """A lower bound on the number of tokens of any text; safe from any thread.

    A token of n bytes accounts for n bytes of its text. So a byte that occurs in no token longer than n is at least an
    n-th of a token, and a text has at least the sum of these shares. They are known for byte-level BPE; other
    vocabularies have one share for all characters, that of their longest token.
    """

    def __init__(self, backend: Tokenizer, max_model_len: int) -> None:
        """Read the vocabulary of a tokenizer.

        Args:
            backend: the tokenizer.
            max_model_len: tokens that the context holds.
        """
        self.max_model_len = max_model_len
        self._per_character = 1 / max(map(len, backend.get_vocab()), default=1)
        self._shares = _shares_of_bytes(backend)
        self._only_ascii = backend.normalizer is not None

    def least_tokens(self, *texts: str) -> int:
        """A lower bound on the tokens of these texts together; counting stops soon after the context's size."""
        total = 0.0
        for text in texts:
            for share, _ in self._shares_of(text, range(0, len(text), PIECE)):
                total += share
                if total > self.max_model_len + 1:
                    break
        return math.ceil(total - ROUNDING)

    def can_fit(self, *texts: str) -> bool:
        """Whether these texts together may fit the context."""
        return self.least_tokens(*texts) <= self.max_model_len

    def end_of(self, text: TemplatedText) -> TemplatedText:
        """A text's end, which has at least as many tokens as the context holds; all of a shorter text."""
        total, kept = 0.0, 0
        for share, length in self._shares_of(text.text, reversed(range(0, len(text.text), PIECE))):
            total, kept = total + share, kept + length
            if total > self.max_model_len + 1:
                return text.last(kept)
        return text

    def _shares_of(self, text: str, starts: Iterable[int]) -> Iterator[tuple[float, int]]:
        """The least tokens of each piece of a text, and its characters."""
        by_byte = self._shares is not None and (not self._only_ascii or text.isascii())
        for start in starts:
            piece = text[start : start + PIECE]
            if by_byte and self._shares is not None:
                raw = np.frombuffer(piece.encode("utf-8", "surrogatepass"), np.uint8)
                yield float(self._shares[raw].sum()), len(piece)
            else:
                yield len(piece) * self._per_character, len(piece)


def _shares_of_bytes(backend: Tokenizer) -> npt.NDArray[np.float64] | None:
    """What share of a token each byte is at least, `[256]`; None for tokenizers that are not known well enough."""
    splits = list(parts_of(backend.pre_tokenizer))
    is_known = (
        isinstance(backend.model, BPE)
        and any(part["type"] == "ByteLevel" for part in splits)
        and all(part.get("behavior") != "Removed" for part in splits)
        and {part["type"] for part in parts_of(backend.normalizer)} <= {"Sequence", *KEEP_ASCII}
    )
    if not is_known:
        return None
    byte_of = {character: byte[0] for character, byte in byte_level_alphabet().items()}
    longest = np.full(256, np.inf)  # a byte without a token of its own is skipped, or fused with its neighbours
    vocabulary = backend.get_vocab(with_added_tokens=False)
    missing = byte_of.keys() & vocabulary.keys()
    for token in sorted(vocabulary, key=len, reverse=True):  # the first one that holds a byte is the longest
        found = missing.intersection(token)
        longest[[byte_of[character] for character in found]] = len(token)
        missing -= found
    for added in backend.get_added_tokens_decoder().values():
        content = added.content.encode()
        longest[list(content)] = np.maximum(longest[list(content)], len(content))
        if added.lstrip or added.rstrip:
            longest[list(WHITE_SPACE)] = np.inf  # such a token takes all white space beside it
    shares: npt.NDArray[np.float64] = 1 / longest
    return shares
