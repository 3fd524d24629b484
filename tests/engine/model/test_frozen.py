"""The frozen model is never written to, is known by its content, and is refused where it would not be exact."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.attention.interface import (
    ATTENTION_NAME,
    AttentionRules,
    PackedRows,
    attend_flat_row,
    register_attention,
)
from server.engine.model.compatibility import refuse_unsupported
from server.engine.model.exactness import own_logits, refuse_inexact
from server.engine.model.frozen import FrozenModel
from server.errors import UnsupportedModel
from tests.engine.tiny_families import tiny_family
from tests.support import (
    EOS,
    TINY,
    byte_tokenizer,
    make_engine,
    random_kv_prompt,
    random_soft_prompt,
    request,
    run_engine,
    tiny_model,
    tiny_module,
    weights_hash,
)


def test_serving_writes_to_no_weight() -> None:
    model = tiny_model()
    before = weights_hash(model.module)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    soft_prompts = [random_soft_prompt(model.spec, 5), random_kv_prompt(model.spec, 5)]
    tensors = [soft_prompt.tensor.clone() for soft_prompt in soft_prompts]
    run_engine(make_engine(model), [(request(str(i), [1, 2], max_new_tokens=8), soft_prompts[i % 2]) for i in range(6)])
    assert weights_hash(model.module) == before
    for soft_prompt, tensor in zip(soft_prompts, tensors, strict=True):
        assert torch.equal(soft_prompt.tensor, tensor)


def test_the_weights_hash_sees_a_single_changed_number() -> None:
    model = tiny_model()
    before = weights_hash(model.module)
    with torch.no_grad():
        next(iter(model.module.parameters()))[0, 0] += 1
    assert weights_hash(model.module) != before


def test_the_fingerprint_tells_models_apart_and_ignores_the_dtype() -> None:
    fingerprint = tiny_model().spec.fingerprint
    assert tiny_model(dtype=torch.float32).spec.fingerprint == fingerprint
    assert tiny_model(dtype=torch.bfloat16).spec.fingerprint == fingerprint
    assert tiny_model("qwen2").spec.fingerprint != fingerprint
    other = tiny_model()
    with torch.no_grad():
        next(iter(other.module.get_input_embeddings().parameters())).add_(0.5)
    again = FrozenModel(other.module, other.tokenizer, name="other", max_model_len=128)
    assert again.spec.fingerprint != fingerprint


def test_the_context_is_at_most_the_models_own() -> None:
    assert tiny_model(max_model_len=10_000).spec.max_model_len == 256


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("kimi_linear", {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}, "linear_att"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rotary"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_config(
    model_type: str, fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        refuse_unsupported(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_in_which_no_token_sees_itself_is_refused(window: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"has {window} tokens") as caught:
        FrozenModel(tiny_family("mistral", sliding_window=window), byte_tokenizer(), name="none", max_model_len=64)
    assert "null" in caught.value.remedy


@pytest.mark.parametrize(
    ("family", "fields"),
    [("opt", {"word_embed_proj_dim": 32}), ("electra", {"embedding_size": 32, "is_decoder": True})],
)
def test_a_soft_prompt_is_as_wide_as_the_embeddings_of_a_model_that_widens_them(
    family: str, fields: dict[str, Any]
) -> None:
    model = FrozenModel(tiny_family(family, **fields), byte_tokenizer(), name=family, max_model_len=64)
    refuse_inexact(model)
    assert (model.spec.hidden_size, model.module.config.hidden_size) == (32, 64)
    soft_prompt = random_soft_prompt(model.spec, 5)
    [outcome] = run_engine(make_engine(model), [(request("r", [1, 2, 3], max_new_tokens=3), soft_prompt)]).values()
    with torch.inference_mode():
        inputs = torch.cat([soft_prompt.tensor, model.embed(torch.tensor([1, 2, 3]))])
        own = own_logits(model.module, inputs_embeds=inputs)
    assert outcome.token_ids[0] == int(own[-1].argmax())


def test_a_model_whose_attention_computes_in_another_dtype_is_refused() -> None:
    """Its keys would not fit into the cache."""
    model = tiny_model(dtype=torch.bfloat16)
    for layer in model.module.get_decoder().layers:  # type: ignore[no-untyped-call]
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda _, __, out: out.float())
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
    with pytest.raises(UnsupportedModel, match="computes in float32"):
        FrozenModel(model.module, model.tokenizer, name="wide", max_model_len=128)


@pytest.mark.parametrize("model_type", ["mamba", "bloom"])
def test_a_model_without_the_attention_interface_is_refused(model_type: str) -> None:
    register_attention()
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(model_type, **sizes)
    module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModel, match=r"AttentionInterface|does not run with"):
        FrozenModel(module, byte_tokenizer(), name=model_type, max_model_len=64)


def test_an_attention_keyword_that_is_not_honoured_is_an_error() -> None:
    states = torch.zeros(1, 2, 3, 4)
    for name in ("position_bias", "attention_mask"):
        arguments = {"attention_mask": None, name: torch.zeros(1)}
        with pytest.raises(UnsupportedModel, match=name):
            attend_flat_row(
                torch.nn.Module(),
                states,
                states,
                states,
                layout=PackedRows([3]),
                **arguments,  # type: ignore[arg-type]
            )


def test_longrope_stays_in_one_regime_whatever_the_batch() -> None:
    """A long neighbour would otherwise switch the frequencies of a short request."""
    register_attention()
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = AutoConfig.for_model("phi3", **(TINY["phi3"] | {"sliding_window": None, "rope_parameters": rope}))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)  # type: ignore[no-untyped-call]
    module.to(torch.float64)
    model = FrozenModel(module, byte_tokenizer(), name="longrope", max_model_len=128)
    short = request("short", [1, 2, 3], max_new_tokens=8)
    long = request("long", list(range(60)), max_new_tokens=8)
    alone = run_engine(make_engine(model, max_batch_tokens=128), [(short, None)])["short"].token_ids
    together = run_engine(make_engine(model, max_batch_tokens=128), [(short, None), (long, None)])
    assert together["short"].token_ids == alone


def test_training_attention_is_served_attention_for_one_whole_row() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 6, 4, dtype=torch.float64, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    got = PackedRows([6]).attend(0, query, key, value, AttentionRules(0.5))
    torch.testing.assert_close(got.transpose(0, 1), expected)


def _model_that_ends_at(
    generation: int | list[int] | None, config: int | list[int] | None, tokenizer: str | None
) -> FrozenModel:
    """A tiny model whose three places name these end tokens."""
    module = tiny_module(attention=ATTENTION_NAME)
    assert module.generation_config is not None, "from_config makes one"
    module.generation_config.eos_token_id = generation
    module.config.eos_token_id = config
    words = byte_tokenizer()
    words.eos_token = tokenizer
    return FrozenModel(module, words, name="tiny", max_model_len=128)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends", "taught"),
    [
        ([5, 3], 4, "<eos>", {3, 4, 5, EOS}, 3),
        (5, None, None, {5}, 5),
        (None, [7, 6], "<eos>", {6, 7, EOS}, 6),
        (None, None, "<eos>", {EOS}, EOS),
        (None, None, None, set(), None),
        ([300, 5, -1], 10_000, "<eos>", {5, EOS}, 5),
        (300, 300, "<eos>", {EOS}, EOS),
    ],
)
def test_a_generation_ends_at_what_any_place_names_and_the_model_has(
    generation: int | list[int] | None,
    config: int | list[int] | None,
    tokenizer: str | None,
    ends: set[int],
    taught: int | None,
) -> None:
    model = _model_that_ends_at(generation, config, tokenizer)
    assert model.eos_token_ids == ends
    assert model.text.end_token_id == taught


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    model = tiny_model()
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        model.text.encode("word another " * 40_000)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    turns = 0
    while not ended.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 10, "the tokenizer holds the interpreter's lock"


def test_texts_have_the_tokens_that_the_tokenizer_gives_them_alone() -> None:
    model = tiny_model()
    for text in ("", "a", " the  cat\n", "Ünï 123 🙂" * 3):
        for special in (True, False):
            assert model.text.encode(text, add_special_tokens=special) == (
                model.text.backend.encode(text, add_special_tokens=special).ids
            )
        whole = model.text.backend.encode(text)
        assert model.text.tokenize(text) == [(id_, *span) for id_, span in zip(whole.ids, whole.offsets, strict=True)]
