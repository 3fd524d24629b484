"""From token ids to text, one at a time: never half a character, never a piece of a stop string."""

from __future__ import annotations

import logging

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental text of one sequence. The pieces that it gives out, joined, are the generated text.

    tokenizers' DecodeStream holds back bytes that do not form a character yet; this class holds back what may still
    become a stop string. Special tokens give no text.

    DecodeStream gives up where a decoder changes its mind about text that it gave out before (byte fallback, when bytes
    turn out to be no character). From there on all tokens are decoded at every step, which is slow, rare and right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        """Start with no text."""
        self._backend = tokenizer.backend_tokenizer
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._decoded = 0  # characters of the whole text that were taken so far
        self._stop = stop
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that this token makes certain, and whether a stop string has ended the sequence."""
        text = self._decode(token_id)
        if not self._stop:
            return text, False
        self._held += text
        ends = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if ends:
            return self._release(min(ends)), True
        return self._release(len(self._held) - self._possible_stop()), False

    def flush(self) -> str:
        """What was held back, once it is certain that nothing follows."""
        return self._release(len(self._held))

    def _decode(self, token_id: int) -> str:
        """Text that this token adds, once it forms characters."""
        self._token_ids.append(token_id)
        if self._stream is not None:
            try:
                text = self._stream.step(self._backend, token_id) or ""
            except Exception:  # tokenizers raises nothing narrower
                log.debug("this decoder cannot be streamed here; decoding from the start", exc_info=True)
                self._stream = None
            else:
                self._decoded += len(text)
                return text
        whole: str = self._backend.decode(self._token_ids, skip_special_tokens=True)
        if whole.endswith(REPLACEMENT):  # perhaps half a character
            return ""
        text = whole[self._decoded :]
        self._decoded = max(self._decoded, len(whole))
        return text

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if stop.startswith(self._held[-length:])
            ),
            default=0,
        )
