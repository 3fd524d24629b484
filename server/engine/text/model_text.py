"""Converts texts to token ids and back, for one model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from server.contracts import ChatEnd, ModelSpec, TemplatedText
from server.engine.text.chat import render_chat
from server.engine.text.length_bound import LengthBound
from server.engine.text.special_tokens import InputEncoder
from server.engine.text.token_texts import TokenTexts
from server.errors import UnknownToken, UnsupportedModel
from server.settings import SpecialTokensInInput

KNOWN_LABELS, SHORT_LABEL = 4096, 64
"""Number of labels whose token ids are kept, and the most characters of each."""


class ModelText:
    """Conversion between texts and tokens for one model; every method is safe from any thread.

    Attributes:
        backend: the tokenizer's Rust part.
        tokens: the text of single tokens.
        special_tokens_in_input: whether special tokens in a user's text are text or control tokens.
        end_token_id: the token that ends a text; training appends it to every target.
        length_bound: refuses texts that can never fit before they are tokenised.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: ModelSpec,
        end_token_id: int | None,
        *,
        special_tokens_in_input: SpecialTokensInInput = "text",
    ) -> None:
        """Take a model's tokenizer, which must not change any more; raises UnsupportedModel without a fast form."""
        self._ids: dict[int, int] = {}  # one object for each id: lists then take 8 bytes per token instead of 36
        self.backend = _plain_backend(tokenizer)
        self.tokens = TokenTexts(self.backend, tokenizer.all_special_ids)
        self.special_tokens_in_input = special_tokens_in_input
        self.end_token_id = end_token_id
        self.length_bound = LengthBound(self.backend, spec.max_model_len)
        self._tokenizer = tokenizer
        self._num_embeddings = spec.vocab_size
        self._exceeds_embeddings = max(tokenizer.get_vocab().values()) >= spec.vocab_size
        self._encode_short_label = lru_cache(KNOWN_LABELS)(self._encode_label)
        self._encoder = (
            InputEncoder(self.backend, unknown_id=tokenizer.unk_token_id) if special_tokens_in_input == "text" else None
        )

    def encode(self, text: str | TemplatedText, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with a BOS if the tokenizer adds one.

        `add_special_tokens` is False for a text that contains its special tokens, such as a rendered chat. Other
        threads can run meanwhile: the tokenizer's batch methods, unlike its `encode`, release the interpreter's lock.

        Raises:
            UnknownToken: the text contains a token of the tokenizer that has no embedding in the model.
            InvalidRequest: a user's text in a template cannot be distinguished from a special token.
        """
        if self._encoder is not None and isinstance(text, TemplatedText):
            ids = self._encoder.encode(text, add_special_tokens=add_special_tokens)
        else:
            raw = text.text if isinstance(text, TemplatedText) else text
            [encoding] = self.backend.encode_batch_fast([raw], add_special_tokens=add_special_tokens)
            ids = encoding.ids
        ids = list(map(self._ids.setdefault, ids, ids))
        if self._exceeds_embeddings:
            self.check_tokens(ids)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]], end: ChatEnd = ChatEnd.ANSWER) -> TemplatedText:
        """Render a conversation with the model's chat template; see `chat.render_chat`."""
        return render_chat(self._tokenizer, messages, self._encoder, self.length_bound, end)

    def check_tokens(self, token_ids: Sequence[int], source: str = "The text") -> None:
        """Refuse ids without an embedding row: reading such a row would raise an error or, on CUDA, break the process.

        The UnknownToken that it raises names the first such id.
        """
        rows = self._num_embeddings
        if not token_ids or (max(token_ids) < rows and min(token_ids) >= 0):
            return
        unknown = next(token_id for token_id in token_ids if not 0 <= token_id < rows)
        name = self.tokens.text_of(unknown) if 0 <= unknown < 2**31 else ""
        raise UnknownToken(
            f"{source} holds the token {unknown}{f' ({name[:80]!r})' if name else ''}, but the model has embeddings "
            f"for the tokens 0 to {rows - 1:,} only."
        )

    def tokenize(self, text: str) -> list[tuple[int, int, int]]:
        """The tokens of a text as (id, start, stop), with offsets in characters."""
        [encoding] = self.backend.encode_batch([text])
        return [(token_id, start, stop) for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)]

    def encode_label(self, label: str, continue_text: bool) -> tuple[int, ...]:
        """Token ids of a label; those of short labels are kept, because most requests of a task have the same labels.

        With `continue_text`, the label continues the input; otherwise it is tokenised as training tokenises targets.
        """
        encode = self._encode_short_label if len(label) <= SHORT_LABEL else self._encode_label
        return encode(label, continue_text)

    def _encode_label(self, label: str, continue_text: bool) -> tuple[int, ...]:
        return tuple(self.encode_after_text(label) if continue_text else self.encode(label, add_special_tokens=False))

    def encode_after_text(self, text: str) -> list[int]:
        """Token ids of a text that continues another text."""
        return self.tokens.encode_after_text(text)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer, with truncation and padding disabled.

    It is called directly, because transformers' wrapper changes its state, which fails while another thread reads it.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel("The model's tokenizer has no fast (tokenizers) form.")
    backend.no_truncation()
    backend.no_padding()
    return backend


def common_start(read: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common beginning of all given token ids that leaves at least one token of each."""
    rest = iter(read)
    first = last = next(rest)  # in lexical order, a beginning shared by the first and the last is shared by all
    most = len(first) - 1
    for ids in rest:
        first, last, most = min(first, ids), max(last, ids), min(most, len(ids) - 1)
    return first[: next((i for i in range(most) if first[i] != last[i]), most)]
