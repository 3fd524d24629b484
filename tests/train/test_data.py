from __future__ import annotations

import codecs
import hashlib
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from server.api.generation import prepare
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.errors import InvalidTrainingData
from server.registry.registry import Registry
from server.registry.store import Store
from server.soft_prompts.manifest import Manifest
from server.train import data as data_module
from server.train.data import check_lengths, encode_examples, labels_of, read_data
from server.train.rows import Row
from tests.registry.fakes import MemoryObjects
from tests.support import EOS, byte_tokenizer, make_engine, random_soft_prompt, tiny_module
from tests.train.rows import TEMPLATE, data_of, write_rows

GOOD = b'{"input": "a", "target": "b"}\n'


def test_rows_keep_their_text_and_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + '{"target": " ö ", "input": "two\\nlines", "id": 7}'.encode())
    data = read_data(path)
    assert data.rows == (Row("a", "b", 1), Row("two\nlines", " ö ", 3))
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.path == path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"a,b", "not JSON"),
        (b'{"input": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["a", "b"]', "no string field 'input'"),
        (b'{"target": "b"}', "no string field 'input'"),
        (b'{"input": "a"}', "no string field 'target'"),
        (b'{"input": "a", "target": 1}', "no string field 'target'"),
        (b'{"input": null, "target": "b"}', "no string field 'input'"),
        (b'{"input": " ", "target": "b"}', "'input' is empty"),
        (b'{"input": "a", "target": ""}', "'target' is empty"),
        (b'{"input": "\xff", "target": "b"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line_with_a_remedy(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + GOOD + line + b"\n" + GOOD)
    with pytest.raises(InvalidTrainingData) as caught:
        read_data(path)
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert problem in caught.value.message
    assert ("UTF-8" if "UTF-8" in problem else '{"input": "…", "target": "…"}') in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidTrainingData, match=r"rows\.jsonl holds no rows"):
        read_data(path)


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrainingData, match=r"none\.jsonl cannot be read: No such file .* Check the path\."):
        read_data(tmp_path / "none.jsonl")


def test_an_example_is_the_templated_input_then_the_target_then_the_end_token(tiny: FrozenModel) -> None:
    manifest = Manifest(input_template="Text: {input}\nLabel:")
    [example] = encode_examples(data_of([("héllo", " yes")]), tiny, manifest, 5)
    assert example.input_ids == tuple(tiny.tokenizer.encode("Text: héllo\nLabel:"))
    assert example.target_ids == (*tiny.tokenizer.encode(" yes"), EOS)
    assert example.fed_ids == example.input_ids + example.target_ids[:-1]


def with_bos_tokenizer() -> FrozenModel:
    """A tiny model whose tokenizer puts a token before every text, as llama's does."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", bos)])
    return FrozenModel(tiny_module(attention="prelude"), tokenizer, name="with-bos", max_model_len=128)


async def test_an_example_is_tokenised_exactly_as_a_request_for_its_task_is(tmp_path: Path) -> None:
    model = with_bos_tokenizer()
    soft_prompt = random_soft_prompt(model.spec, manifest={"input_template": TEMPLATE})
    registry = Registry(Store(MemoryObjects()), model.spec, 512)
    registry.publish("mood", [soft_prompt], "api")
    prepared = await prepare(EngineWorker(make_engine(model)), registry, task="mood", text="good ä")
    [example] = encode_examples(data_of([("good ä", "yes")]), model, soft_prompt.manifest, 5)
    assert example.input_ids == prepared.request.input_ids
    assert example.input_ids[0] == model.tokenizer.bos_token_id
    prepared = await prepare(EngineWorker(make_engine(model)), registry, task="mood", text="a<eos><bos>")
    [example] = encode_examples(data_of([("a<eos><bos>", "yes")]), model, soft_prompt.manifest, 5)
    assert example.input_ids == prepared.request.input_ids
    assert model.text.end_token_id not in example.input_ids, "special tokens of a row are text, too"
    assert model.tokenizer.bos_token_id not in example.target_ids


def test_a_row_that_exceeds_the_context_is_refused_by_line_with_both_lengths(tiny: FrozenModel) -> None:
    template = Manifest(input_template=TEMPLATE)
    assert tiny.spec.max_model_len == 128
    longest = ("x" * 119, "yes")  # 5 virtual + 119 + newline + 3, and the end token is only predicted
    [example] = encode_examples(data_of([longest]), tiny, template, 5)
    assert 5 + len(example.fed_ids) == 128
    with pytest.raises(InvalidTrainingData) as caught:
        encode_examples(data_of([longest, ("x" * 120, "yes")]), tiny, template, 5)
    assert caught.value.message == "rows.jsonl, line 2: 129 tokens with the 5 virtual ones; the context holds 128."
    assert "PRELUDE_MAX_MODEL_LEN" in caught.value.remedy


def test_lengths_are_checked_without_the_model_as_with_it(tiny: FrozenModel) -> None:
    manifest, most = Manifest(input_template=TEMPLATE), tiny.spec.max_model_len
    check_lengths(data_of([("x" * 119, "yes"), ("a", "b")]), manifest, 5, tiny.text.encode, most)
    with pytest.raises(InvalidTrainingData, match=r"rows\.jsonl, line 2: 129 tokens with the 5 virtual ones"):
        check_lengths(data_of([("a", "b"), ("x" * 120, "yes")]), manifest, 5, tiny.text.encode, most)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + GOOD)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(GOOD)
    assert read_data(path).rows == read_data(plain).rows


def test_targets_are_labels_only_where_they_are_few_and_repeated() -> None:
    rows = data_of([(str(i), "ab"[i % 2]) for i in range(10)]).rows
    assert labels_of(rows) == ("a", "b")
    assert labels_of(rows[:6]) == ("a", "b")
    assert labels_of(rows[:5]) is None
    assert labels_of(data_of([(str(i), str(i)) for i in range(10)]).rows) is None
    assert labels_of(rows, most=1) is None


def test_the_first_rows_of_a_file_are_still_that_file(tmp_path: Path) -> None:
    data = read_data(write_rows(tmp_path / "rows.jsonl", [("a", "b"), ("c", "d")]))
    assert data.first(1).rows == data.rows[:1]
    assert data.first(1).sha256 == data.sha256
    assert data.first(None) == data


def test_half_a_surrogate_pair_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "fine", "target": "a"}\n{"input": "\\ud800", "target": "a"}\n', encoding="utf-8")
    with pytest.raises(InvalidTrainingData, match="line 2: 'input' holds half"):
        read_data(path)


def test_rows_that_take_too_much_memory_are_refused_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "MAX_ROWS_BYTES", 10_000)
    path = write_rows(tmp_path / "rows", [("a" * 1000, "yes")] * 20)
    with pytest.raises(InvalidTrainingData, match=r"line 10: the rows up to here take more than 10,000 bytes"):
        read_data(path)
    wide = write_rows(tmp_path / "wide", [("a" * 999 + "\U0001f642", "yes")] * 20)
    with pytest.raises(InvalidTrainingData, match="line 3: "):
        read_data(wide)
