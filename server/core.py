"""Words that every layer shares: what is asked of the engine and what comes back, free of torch and of HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the rest of the server may know of the frozen model."""

    name: str
    fingerprint: str
    """Identity of the weights (design: config fields and a sample of embedding rows), independent of dtype."""
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str

    @property
    def kv_width(self) -> int:
        """Numbers per virtual token in a KV soft prompt as PEFT saves it: layers x (K, V) x heads x head_dim."""
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim


class FinishReason(StrEnum):
    """Why a sequence ended; the first three are text-generation-inference's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105
    STOP_SEQUENCE = "stop_sequence"
    ABORTED = "aborted"
    FAILED = "failed"


COLDEST = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding of 128 tokens."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """End-of-sequence tokens are not eligible before this many tokens."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it before top-k and top-p."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    repetition_penalty: float = 1.0
    """CTRL's penalty (Keskar et al. 2019) over input and output tokens; 1 is off. Virtual tokens have no id."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The text ends before the first of these that appears in it."""
    ignore_eos: bool = False
    logprobs: bool = False
    """Report the chosen token's log-probability under the model's own distribution."""

    @property
    def is_greedy(self) -> bool:
        """True where the most likely token is taken; so cold that logits would leave a float's range is greedy too."""
        return self.temperature < COLDEST


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted request, translated: token ids in, sampling rules, and the queue (task) that it waits in."""

    request_id: str
    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. The non-special texts of a request, joined, are its generated text."""

    id: int
    text: str
    logprob: float | None = None
    special: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    virtual_tokens: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to one request; the last one of a request carries `finish_reason`."""

    request_id: str
    token: Token | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None
    """Set with FAILED: what the one who waits is to be told."""
