"""Turns token ids into text one at a time, without partial characters or parts of stop strings."""

import codecs
import logging
from collections import deque

from tokenizers.decoders import DecodeStream

from server.contracts import SamplingParams, Token
from server.engine.text.token_texts import TokenTexts

log = logging.getLogger(__name__)

MOST_PENDING = 16
"""Tokens that a stream may hold back before it is restarted; up to three more if a character is incomplete."""


class Decoder:
    """Incremental decoder of token ids: returns the text that each token adds, in complete characters.

    The text of a byte-level vocabulary is its tokens' bytes in UTF-8, so these are decoded directly. Other vocabularies
    use tokenizers' DecodeStream. At each step, it decodes all tokens that it holds back, and it holds back text that
    ends in U+FFFD, which it takes for a partial character. Therefore a stream is restarted once it holds back text that
    no later token can change:

    - whole characters, which are returned as soon as they are certain;
    - bytes that cannot begin a character, which become U+FFFD;
    - any text at which DecodeStream fails, because its decoder has changed text that was already returned (byte
      fallback, when bytes turn out not to form a character).
    """

    def __init__(self, texts: TokenTexts, *, continues_text: bool = True, show_special: bool = False) -> None:
        """Start with an empty text, which includes special tokens if `show_special`.

        With `continues_text`, a leading space is part of the text; otherwise one that the tokenizer adds is removed.
        """
        self._texts = texts
        self._skip_special = not show_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace" if texts.is_byte_level else "strict")
        self._bytes_are_text = continues_text or not texts.puts_space_first
        self._holds_back = False  # whether bytes of an incomplete character are pending
        if not texts.is_byte_level:
            self._begin()

    def step(self, token_id: int) -> str:
        """The text that this token adds."""
        if not self._texts.is_byte_level:
            is_none = not self._texts.text_of(token_id) or (self._skip_special and token_id in self._texts.special_ids)
            return "" if is_none else self._stream_step(token_id)
        text = None if self._holds_back else self._texts.own_text_of(token_id)
        if text is not None:  # ten times as fast as decoding bytes
            return text
        if self._skip_special and token_id in self._texts.special_ids:
            return ""
        text = self._bytes.decode(self._texts.decoded_bytes_of(token_id))
        self._holds_back = bool(self._bytes.getstate()[0])
        return text

    def _begin(self) -> None:
        """Start a stream, after a primer if the text has or may have a beginning."""
        self._before = list(self._texts.primer if self._bytes_are_text else ())
        self._stream = DecodeStream(self._before, self._skip_special)
        self._pending: list[int] = []  # tokens that the stream holds back
        self._early = ""  # the part of their text that was already returned
        self._bytes.reset()

    def _stream_step(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._texts.backend, token_id)
        except Exception:  # tokenizers raises nothing narrower
            log.debug("this decoder cannot be streamed here; it starts again", exc_info=True)
            return self._flush()
        if text:
            added = text[len(self._early) :]
            self._pending, self._early, self._bytes_are_text = [], "", True
            self._bytes.reset()
            return added
        if not self._bytes_are_text:
            return self._flush() if len(self._pending) >= MOST_PENDING else ""
        try:
            added = self._bytes.decode(self._texts.bytes_of(token_id))
        except UnicodeDecodeError:
            return self._flush()
        self._early += added
        if len(self._pending) >= MOST_PENDING and not self._bytes.getstate()[0]:  # everything was returned
            self._begin()
        return added

    def _flush(self) -> str:
        """The text that the stream holds back, as the decoder reads it now; starts a new stream after it."""
        before, whole = self._decode(self._before), self._decode(self._before + self._pending)
        text = whole[len(before) + len(self._early) :]
        self._bytes_are_text |= bool(text)
        self._begin()
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._texts.backend.decode(token_ids, skip_special_tokens=self._skip_special)
        return text


class Detokenizer:
    """Incremental text of one sequence, token by token; the tokens' texts joined are the generated text.

    A token whose text may become part of a stop string is held back, with all later tokens, until this is certain.
    Every token therefore has the same text as without stop strings, and tokens are returned in order.
    """

    def __init__(self, texts: TokenTexts, params: SamplingParams | None = None, *, continues_text: bool = True) -> None:
        """Start with an empty text; see `Decoder` for `continues_text`."""
        params = params or SamplingParams()
        self._decoder = Decoder(texts, continues_text=continues_text, show_special=params.show_special)
        self._stop, self._include_stop = params.stop, params.include_stop
        self._min_tokens = params.min_new_tokens
        self._num_tokens = self._num_characters = 0
        self._held: deque[Token] = deque()
        self._text = ""
        """The text of the held tokens."""
        self._passed = 0
        """A stop string that ends within this number of leading characters of `_text` comes too early to count."""

    def push(self, token: Token, *, is_last: bool = False, is_text: bool = True) -> tuple[list[Token], bool]:
        """Decode a token; returns the tokens whose texts are now certain, and whether a stop string ends the text.

        If the token completes several stop strings, the one that begins first counts. `is_text` is False for a token
        that only ends the text.
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
        """Start and end of the first stop string in the held text; if several begin there, of the shortest."""
        begins = ((self._text.find(stop, max(0, self._passed - len(stop) + 1)), stop) for stop in self._stop)
        return min(((begin, begin + len(stop)) for begin, stop in begins if begin >= 0), default=None)

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that is the beginning of a stop string."""
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
        """Release the tokens before the last `keep` characters."""
        certain: list[Token] = []
        released = 0
        while self._held and released + len(self._held[0].text) <= len(self._text) - keep:
            released += len(self._held[0].text)
            certain.append(self._held.popleft())
        self._text = self._text[released:]
        self._passed = max(0, self._passed - released)
        return certain

    def _cut(self, length: int) -> list[Token]:
        """All held tokens, with their text cut to `length` characters in total."""
        tokens: list[Token] = []
        for token in self._held:
            tokens.append(token._replace(text=token.text[:length]))
            length -= len(tokens[-1].text)
        return tokens
