"""A model of Llama-3.1-8B's shape with random weights, and its speed in transformers' continuous batching.

Speed does not depend on the values of weights, so nothing is downloaded. `gpu/` measures the engine with the same
model:

    python benchmarks/random_llama.py --batch 256      # prints output tokens per second, or null
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from server.engine.model.frozen import FrozenModel

LLAMA_3_1_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY: dict[str, Any] = {
    **LLAMA_3_1_8B,
    "vocab_size": 50000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
INPUT_TOKENS, OUTPUT_TOKENS = 128, 64


def make_module(attention: str, device: torch.device, *, tiny: bool) -> PreTrainedModel:
    """Create the model on the device, with reproducible weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if tiny else LLAMA_3_1_8B), bos_token_id=None, eos_token_id=None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def model_with_bytes(module: PreTrainedModel, max_model_len: int) -> FrozenModel:
    """The model with a tokenizer that needs no file: one token for each byte, and placeholders for all other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    for i in range(len(alphabet), module.config.vocab_size):
        vocabulary[f"t{i}"] = i
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    return FrozenModel(module, tokenizer, name="random", max_model_len=max_model_len)


def inputs(number: int, tokens: int = INPUT_TOKENS) -> tuple[int, ...]:
    """Token ids of a request; all requests begin differently, so that prefix caches do not help."""
    return tuple((7 + 101 * number + 13 * i * (number + 1)) % 40_000 for i in range(tokens))


def peer_tokens_per_second(options: argparse.Namespace) -> float | None:
    """The better of two runs of the batch in transformers' continuous batching; None if a run does not finish."""
    from transformers import ContinuousBatchingConfig

    module = make_module(
        "sdpa", options.device, tiny=options.tiny
    )  # it uses flash attention instead if that is installed
    config = GenerationConfig(max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default it allocates nearly all memory, which on a CPU is zeroed first.
    limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512) if options.tiny else None
    ids = [list(inputs(i)) for i in range(options.batch)]
    speeds = []
    for _ in range(2):
        began = time.perf_counter()
        results = module.generate_batch(ids, generation_config=config, continuous_batching_config=limits)
        # From the first request to the end of the last one, without starting and stopping its thread.
        first = min((r.created_time for r in results.values()), default=began)
        last = max((r.lifespan[1] for r in results.values()), default=began)
        tokens = sum(len(result.generated_tokens) for result in results.values())
        if tokens != options.batch * OUTPUT_TOKENS:
            return None
        speeds.append(tokens / (last - first))
    return max(speeds)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, default=256)
    print(json.dumps(peer_tokens_per_second(parser.parse_args())))


if __name__ == "__main__":
    main()
