"""From token ids to text, one at a time: never half a character, never a piece of a stop string."""

from __future__ import annotations

import codecs
import logging
from collections import deque

from tokenizers.decoders import DecodeStream

from server.core import SamplingParams, Token
from server.engine.text import REPLACEMENT, TokenTexts

log = logging.getLogger(__name__)


class Decoder:
    """Incremental text of token ids: what each adds, as soon as it forms characters.

    tokenizers' DecodeStream holds back what does not end in a whole character yet, and what ends in U+FFFD, which it
    takes for half of one. Here, characters of it that are certain are given out at once.

    DecodeStream gives up where a decoder changes its mind about text that it gave out before (byte fallback, when bytes
    turn out to be no character). From there on all tokens are decoded at every step, which is slow, rare and right.
    """

    def __init__(self, texts: TokenTexts, *, continues_text: bool = True, show_special: bool = False) -> None:
        """Start with no text.

        Args:
            texts: the vocabulary.
            continues_text: a first space is a part of the text; else one that the tokenizer would put there is not.
            show_special: special tokens are text, too.
        """
        self._texts = texts
        self._skip_special = not show_special
        self._token_ids = list(texts.primer if continues_text or not texts.puts_space_first else ())
        self._stream: DecodeStream | None = DecodeStream(self._token_ids, self._skip_special)
        self._decoded = len(texts.decode(self._token_ids))  # characters of the whole text that were taken so far
        self._early = ""  # what was given out of tokens that the stream still holds back
        self._holds_back = False  # whether the stream has taken tokens that it has not given out yet
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._bytes_are_text = bool(self._token_ids) or not texts.puts_space_first

    def step(self, token_id: int) -> str:
        """Text that this token adds."""
        text = None if self._holds_back else self._texts.own_text_of(token_id)
        if text is not None and self._stream is not None:  # the stream need not see it: this is ten times as fast
            self._token_ids.append(token_id)
            self._decoded += len(text)
            return text
        if self._skip_special and token_id in self._texts.special_ids:
            return ""
        self._token_ids.append(token_id)
        if self._stream is not None:
            try:
                text = self._stream.step(self._texts.backend, token_id)
            except Exception:  # tokenizers raises nothing narrower
                log.debug("this decoder cannot be streamed here; decoding from the start", exc_info=True)
                self._stream = None
            else:
                return self._take(token_id, text)
        whole: str = self._texts.backend.decode(self._token_ids, skip_special_tokens=self._skip_special)
        if whole.endswith(REPLACEMENT):  # perhaps half a character
            return ""
        text = whole[self._decoded :]
        self._decoded = max(self._decoded, len(whole))
        return text

    def _take(self, token_id: int, text: str | None) -> str:
        """What the stream gave out, less what was given out before, or what is certain though it gave out nothing."""
        self._holds_back = not text
        if text:
            added = text[len(self._early) :]
            self._early = ""
            self._bytes.reset()
            self._bytes_are_text = True
        elif self._bytes_are_text:
            try:
                added = self._bytes.decode(self._texts.bytes_of(token_id))
            except UnicodeDecodeError:
                added, self._bytes_are_text = "", False  # until the stream knows what to make of them
            self._early += added
        else:
            added = ""
        self._decoded += len(added)
        return added


class Detokenizer:
    """Incremental text of one sequence, token by token: their texts, joined, are the generated text.

    A token whose text may still become a part of a stop string is held back, with all that come after it, until that is
    certain; so every token has the text that it would have without stop strings, and they come in order.
    """

    def __init__(self, texts: TokenTexts, params: SamplingParams | None = None, *, continues_text: bool = True) -> None:
        """Start with no text; `continues_text` as of `Decoder`."""
        params = params or SamplingParams()
        self._decoder = Decoder(texts, continues_text=continues_text, show_special=params.show_special)
        self._stop, self._include_stop = params.stop, params.include_stop
        self._min_tokens = params.min_new_tokens
        self._num_tokens = self._num_characters = 0
        self._held: deque[Token] = deque()
        self._text = ""
        """That of the held tokens."""
        self._passed = 0
        """A stop string that ends among so many of its characters came too early to count."""

    def push(self, token: Token, *, is_last: bool = False, is_text: bool = True) -> tuple[list[Token], bool]:
        """Tokens whose texts are now certain, with their texts and offsets, and whether a stop string ends the text.

        Of several stop strings that this token completes, the one that begins first counts.

        Args:
            token: the next one; its text is found here.
            is_last: nothing comes after it.
            is_text: False for a token that only ends the text.
        """
        text = self._decoder.step(token.id) if is_text else ""
        token = Token(token.id, text, self._num_characters, token.logprob, token.special, token.top)
        self._num_tokens += 1
        self._num_characters += len(text)
        if not self._stop:
            return [token], False
        self._held.append(token)
        self._text += text
        if self._num_tokens <= self._min_tokens:
            self._passed = len(self._text)
        elif found := self._find_stop():
            begin, end = found
            return self._cut(end if self._include_stop else begin), True
        return self._release(0 if is_last else self._possible_stop()), False

    def _find_stop(self) -> tuple[int, int] | None:
        """Where the first stop string in the held text begins and ends; of two that begin there, the shorter one."""
        found = []
        for stop in self._stop:
            begin = self._text.find(stop, max(0, self._passed - len(stop) + 1))
            if begin >= 0:
                found.append((begin, begin + len(stop)))
        return min(found, default=None)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(min(len(stop) - 1, len(self._text)), 0, -1)
                if stop.startswith(self._text[-length:])
            ),
            default=0,
        )

    def _release(self, keep: int) -> list[Token]:
        """The tokens before those that the last `keep` characters belong to."""
        certain: list[Token] = []
        released = 0
        while self._held and released + len(self._held[0].text) <= len(self._text) - keep:
            released += len(self._held[0].text)
            certain.append(self._held.popleft())
        self._text = self._text[released:]
        self._passed = max(0, self._passed - released)
        return certain

    def _cut(self, length: int) -> list[Token]:
        """All held tokens, with so many characters among them."""
        tokens: list[Token] = []
        for token in self._held:
            tokens.append(token._replace(text=token.text[:length]))
            length -= len(tokens[-1].text)
        return tokens
