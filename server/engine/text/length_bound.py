"""A lower bound on a text's number of tokens, computed from its bytes.

Tokenising a text takes a hundred bytes of memory for each token, and blocks all other threads. A text that can never
fit the context is therefore refused or truncated before it is tokenised.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import BPE

from server.contracts import TemplatedText
from server.engine.text.tokenizer_parts import byte_level_alphabet, parts_of

PIECE = 2**14
"""Number of characters that are processed at a time."""
KEEP_ASCII = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that do not change ASCII text."""
WHITE_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001)))).encode()
"""All bytes that occur in the UTF-8 encoding of white-space characters."""
ROUNDING = 1e-6


class LengthBound:
    """Computes lower bounds on the number of tokens of texts; safe from any thread.

    A token of n bytes covers n bytes of its text. A byte that occurs in no token longer than n bytes therefore counts
    as at least 1/n of a token, and a text has at least the sum of these shares. Shares of bytes are known for
    byte-level BPE; in other vocabularies, all characters have the share that follows from the longest token.
    """

    def __init__(self, backend: Tokenizer, max_model_len: int) -> None:
        """Read the vocabulary of a tokenizer, for a context of `max_model_len` tokens."""
        self.max_model_len = max_model_len
        self._per_character = 1 / max(map(len, backend.get_vocab()), default=1)
        self._shares = _shares_of_bytes(backend)
        self._only_ascii = backend.normalizer is not None

    def least_tokens(self, *texts: str) -> int:
        """A lower bound on the number of tokens of these texts together; counts little further than the context."""
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
        """The end of a text, with at least as many tokens as the context; a shorter text is returned whole."""
        total, kept = 0.0, 0
        for share, length in self._shares_of(text.text, reversed(range(0, len(text.text), PIECE))):
            total, kept = total + share, kept + length
            if total > self.max_model_len + 1:
                return text.last(kept)
        return text

    def _shares_of(self, text: str, starts: Iterable[int]) -> Iterator[tuple[float, int]]:
        """For each piece of a text, the lower bound on its tokens, and its number of characters."""
        by_byte = self._shares is not None and (not self._only_ascii or text.isascii())
        for start in starts:
            piece = text[start : start + PIECE]
            if by_byte and self._shares is not None:
                raw = np.frombuffer(piece.encode("utf-8", "surrogatepass"), np.uint8)
                yield float(self._shares[raw].sum()), len(piece)
            else:
                yield len(piece) * self._per_character, len(piece)


def _shares_of_bytes(backend: Tokenizer) -> npt.NDArray[np.float64] | None:
    """The minimum share of a token of each byte, `[256]`; None for tokenizers whose shares are not known."""
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
    longest = np.full(256, np.inf)  # a byte without a token may be skipped, or fused with its neighbours
    vocabulary = backend.get_vocab(with_added_tokens=False)
    missing = byte_of.keys() & vocabulary.keys()
    for token in sorted(vocabulary, key=len, reverse=True):  # the first token that contains a byte is the longest
        found = missing.intersection(token)
        longest[[byte_of[character] for character in found]] = len(token)
        missing -= found
    for added in backend.get_added_tokens_decoder().values():
        content = added.content.encode()
        longest[list(content)] = np.maximum(longest[list(content)], len(content))
        if added.lstrip or added.rstrip:
            longest[list(WHITE_SPACE)] = np.inf  # such a token absorbs all adjacent white space
    shares: npt.NDArray[np.float64] = 1 / longest
    return shares
