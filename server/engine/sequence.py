"""One request in flight: what it began with, where it stands."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from server.core import GenerationRequest, SamplingParams, Usage
from server.engine.detokenizer import Detokenizer
from server.engine.kv_cache import Slot
from server.soft_prompts.soft_prompt import SoftPrompt


@dataclass(eq=False)
class Sequence:
    """A request from admission to its end.

    It holds the immutable soft prompt that it began with; that reference is all the pinning there is. Its positions
    are, in this order: virtual tokens, input tokens, output tokens.
    """

    request: GenerationRequest
    soft_prompt: SoftPrompt | None
    detokenizer: Detokenizer
    slot: Slot | None = None
    num_computed: int = 0
    """Positions whose keys and values are in the slot."""
    num_finite: int = 0
    """Positions whose keys and values are known to be finite: those before a token that could be chosen."""
    output_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.sampling.seed)
        self.seen_ids = set(self.request.input_ids)
        """Token ids of input and output, for the repetition penalty."""
        self.num_virtual_tokens = 0 if self.soft_prompt is None else self.soft_prompt.num_virtual_tokens
        """Positions of its soft prompt."""
        self._num_given = self.num_virtual_tokens + len(self.request.input_ids)

    @property
    def request_id(self) -> str:
        """The id under which the request was accepted."""
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.sampling

    @property
    def num_known(self) -> int:
        """Positions whose token is known, computed or not."""
        return self._num_given + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Positions that the next steps must compute: 1 while decoding, more while prefilling."""
        return self._num_given + len(self.output_ids) - self.num_computed

    @property
    def max_positions(self) -> int:
        """Positions that it can ever need; the last new token is never fed."""
        new = max(0, self.sampling.max_new_tokens - 1)
        return self.num_virtual_tokens + len(self.request.input_ids) + new

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(self.num_virtual_tokens, len(self.request.input_ids), len(self.output_ids))

    def token_at(self, position: int) -> int:
        """Token id at a position behind the virtual tokens."""
        index = position - self.num_virtual_tokens
        inputs = self.request.input_ids
        return inputs[index] if index < len(inputs) else self.output_ids[index - len(inputs)]

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        self.output_ids.append(token_id)
        self.seen_ids.add(token_id)
