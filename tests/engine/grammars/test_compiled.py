"""Generated text matches its grammar whatever the model would say, in any batch, and no grammar hurts anybody else."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from server.contracts import MAX_SCHEMA_DEPTH, FinishReason, Grammar, GrammarKind
from server.engine.grammars.compiled import Grammars, unpacked
from server.engine.grammars.limits import MAX_UNUSED
from server.engine.grammars.walks import Walk, Walks
from server.engine.model.frozen import FrozenModel
from server.errors import InvalidRequest
from tests.support import EOS, VOCAB_SIZE, byte_tokenizer, make_engine, request, run_engine

PERSON = Grammar(
    GrammarKind.JSON_SCHEMA,
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)
DATE = Grammar(GrammarKind.REGEX, r"[0-9]{4}-[01][0-9]")
ANIMAL = Grammar(GrammarKind.CHOICE, json.dumps(["cat", 'a "dog"', "bird"]))


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(byte_tokenizer().backend_tokenizer, VOCAB_SIZE, [EOS])
    yield grammars
    grammars.close()


class Text:
    """One text that is written token by token."""

    def __init__(self, grammars: Grammars, grammar: Grammar) -> None:
        self._walks = Walks(grammars)
        self.walk: Walk = self._walks.begin("text", grammars.compile(grammar), 1)[0]

    def allows(self, token_id: int) -> bool:
        return bool(unpacked(self.walk.mask, VOCAB_SIZE)[token_id])

    def accept(self, token_id: int) -> None:
        self._walks.accept(self.walk, token_id, is_last=False)
        while self.walk.is_waiting:
            self._walks.collect(also_slow=True)
        assert self.walk.error is None

    def close(self) -> None:
        self._walks.end("text")


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_text_matches_its_grammar(tiny: FrozenModel, temperature: float) -> None:
    asked = [
        (request(f"{name} {i}", [i], grammar=grammar, temperature=temperature, seed=i, max_new_tokens=60), None)
        for i in range(4)
        for name, grammar in (("person", PERSON), ("date", DATE), ("animal", ANIMAL), ("free", None))
    ]
    outcomes = run_engine(make_engine(tiny, max_sequences=16, max_batch_tokens=32), asked, arrive_every=1)
    for name, outcome in outcomes.items():
        if name.startswith("person"):
            person = json.loads(outcome.text)
            assert person["name"] in ("Ann", "Bob")
            assert 0 <= person["age"] <= 9
        elif name.startswith("date"):
            assert re.fullmatch(DATE.source, outcome.text)
        elif name.startswith("animal"):
            assert outcome.text in json.loads(ANIMAL.source)
        if not name.startswith("free"):
            assert outcome.finish_reason is FinishReason.EOS_TOKEN
    for i in range(4):
        alone = request("r", [i], temperature=temperature, seed=i, max_new_tokens=60)
        assert run_engine(make_engine(tiny), [(alone, None)])["r"].token_ids == outcomes[f"free {i}"].token_ids


def test_choices_of_one_request_walk_through_the_grammar_each_for_itself(tiny: FrozenModel) -> None:
    asked = request("r", [1], n=12, grammar=ANIMAL, temperature=80.0, max_new_tokens=30)
    texts = {outcome.text for outcome in run_engine(make_engine(tiny), [(asked, None)]).values()}
    assert texts <= set(json.loads(ANIMAL.source))
    assert len(texts) > 1


def test_a_text_that_is_complete_ends_without_another_step(tiny: FrozenModel) -> None:
    engine = make_engine(tiny)
    outcome = run_engine(engine, [(request("r", [1], grammar=DATE, max_new_tokens=60, ignore_eos=True), None)])["r"]
    assert len(outcome.token_ids) == 7
    assert engine.steps == 7


def takes(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether a text, byte by byte, is one that the grammar describes whole."""
    with contextlib.closing(Text(grammars, grammar)) as written:
        for token_id in byte_tokenizer().encode(text):
            if written.walk.is_complete or not written.allows(token_id):
                return False
            written.accept(token_id)
        return written.walk.is_complete or written.allows(EOS)


OCTET = r"(25[0-5]|2[0-4]\d|[01]?\d\d?)"


@pytest.mark.parametrize(
    ("regex", "matching", "others"),
    [
        (rf"({OCTET}\.){{3}}{OCTET}", ["192.168.0.1"], ["١٩٢.١٦٨.٠.١", "192.168.0.٣"]),
        (r"[\d_]+", ["1_2"], ["٣", "߁_"]),
        (r"\w\W", ["a.", "_é"], ["é.", "ab"]),
        (r"[^\D2]\D", ["1a", "3٣"], ["2a", "٣a", "11"]),
        (r"\\d[\\d]", [r"\dd", r"\d\\"[:3]], ["12", r"\d1"]),
        (r"a/b", ["a/b"], [r"a\/b"]),
        (r"\p{Nd}\s", ["٣ ", "3\u00a0"], ["a "]),
    ],
)
def test_digits_and_letters_of_a_regular_expression_are_ascii_as_in_ecma_262(
    grammars: Grammars, regex: str, matching: list[str], others: list[str]
) -> None:
    for text in matching:
        assert takes(grammars, Grammar(GrammarKind.REGEX, regex), text), text
    for text in others:
        assert not takes(grammars, Grammar(GrammarKind.REGEX, regex), text), text


SUM = 'root ::= term (op term)*\nop ::= "+" | "-"\nterm ::= [0-9]+ | "(" root ")"'
LARK_SUM = 'start: term (OP term)*\nOP: "+" | "-"\nterm: /[0-9]+/ | "(" start ")"'


@pytest.mark.parametrize(
    "grammar",
    [Grammar(GrammarKind.EBNF, SUM), Grammar(GrammarKind.EBNF, LARK_SUM), Grammar(GrammarKind.LARK, LARK_SUM)],
    ids=["GBNF", "Lark sent as EBNF", "Lark"],
)
def test_a_grammar_of_rules_that_refer_to_themselves_is_matched(grammars: Grammars, grammar: Grammar) -> None:
    for text in ("1", "12+(3-(4))-5"):
        assert takes(grammars, grammar, text), text
    for text in ("1+", "(1", "a"):
        assert not takes(grammars, grammar, text), text


@pytest.mark.parametrize(
    ("source", "matching", "others"),
    [
        ('root ::= "a"  # one | "c"\n  | "b"\n\nx ::= "c"', ["a", "b"], ["c", "ab"]),
        ('\n  root ::=\n    "a"\n    x\n  x ::= [0-9] # "\n', ["a1"], ["a", "1"]),
        (r'root ::= "\u00e9" | "\x41" | [\u00e0\u005d] | "\\u00e9"', ["é", "A", "à", "]", r"\u00e9"], ["a", "e9"]),
        ('?start: "a" | b\n?b: "c"', ["a", "c"], ["b"]),
        ('start ::= "a"{2,3}  # start ::=\nroot ::= start "start" [start]', ["aastarts"], ["astarts", "a"]),
        (
            'root ::= itemList item-list 2nd é\nitemList ::= "a"\nitem-list ::= "b"\n2nd ::= "c"\né ::= "d"',
            ["abcd"],
            ["a"],
        ),
    ],
    ids=["alternatives on lines", "parts on lines", "escapes", "Lark with ?start", "a rule named start", "names"],
)
def test_ebnf_may_span_lines_name_characters_and_be_lark(
    grammars: Grammars, source: str, matching: list[str], others: list[str]
) -> None:
    for text in matching:
        assert takes(grammars, Grammar(GrammarKind.EBNF, source), text), text
    for text in others:
        assert not takes(grammars, Grammar(GrammarKind.EBNF, source), text), text


def first(grammars: Grammars, grammar: Grammar, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Which tokens a text may begin with."""
    compiled = grammars.compile(grammar)
    grammars.release(compiled)
    return unpacked(compiled.first, vocab_size)


def test_between_the_parts_of_a_json_text_there_is_at_most_one_space(grammars: Grammars) -> None:
    assert takes(grammars, PERSON, '{"name": "Ann", "age": 3}')
    assert takes(grammars, PERSON, '{"name":"Bob","age":3}')
    assert not takes(grammars, PERSON, '{"name":  "Ann", "age": 3}')
    assert not takes(grammars, PERSON, '{"name":\n"Ann", "age": 3}')


def test_tokens_beyond_the_tokenizers_vocabulary_are_never_allowed(grammars: Grammars) -> None:
    allowed = first(grammars, DATE, VOCAB_SIZE + 100)
    assert len(allowed) == VOCAB_SIZE + 100
    assert not allowed[VOCAB_SIZE:].any()
    digits = {byte_tokenizer().encode(digit)[0] for digit in "0123456789"}
    assert set(allowed.nonzero()[0].tolist()) == digits


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "nothing"}'), "JSON schema cannot be used"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "JSON schema cannot be used"),
        (Grammar(GrammarKind.REGEX, "(a"), "regular expression cannot be used"),
        (Grammar(GrammarKind.REGEX, r"(?=a)b"), "regular expression cannot be used"),
        (Grammar(GrammarKind.LARK, "start: missing"), "Lark grammar cannot be used"),
        (Grammar(GrammarKind.EBNF, 'answer ::= "a"'), "EBNF grammar cannot be used: .*root"),
        (Grammar(GrammarKind.EBNF, 'root ::= "a'), "EBNF grammar cannot be used"),
        (Grammar(GrammarKind.EBNF, 'root ::= "a\\'), "EBNF grammar cannot be used: it ends within a text"),
        (Grammar(GrammarKind.EBNF, "root ::= " + "(" * 5000), "EBNF grammar cannot be used: it is nested too deeply"),
        (Grammar(GrammarKind.EBNF, 'root ::= "a" start'), "EBNF grammar cannot be used: Rule 'start' is not defined"),
        (Grammar(GrammarKind.REGEX, r"[^\s\S]"), "No text can match it"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#"}'), "No text can match it"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(grammars: Grammars, grammar: Grammar, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        grammars.compile(grammar)


def nested(depth: int) -> str:
    """A JSON schema of so many objects within each other, as text: a list in a list in a list."""
    return '{"type": "array", "items": ' * (depth - 1) + '{"type": "integer"}' + "}" * (depth - 1)


def test_a_schema_may_be_nested_as_deeply_as_is_documented_and_no_deeper(grammars: Grammars) -> None:
    first(grammars, Grammar(GrammarKind.JSON_SCHEMA, nested(MAX_SCHEMA_DEPTH)))
    message = f"The JSON schema cannot be used: it is nested more than {MAX_SCHEMA_DEPTH} deep."
    for depth in (*range(MAX_SCHEMA_DEPTH + 1, MAX_SCHEMA_DEPTH + 9), 1000, 100_000):
        with pytest.raises(InvalidRequest) as refused:
            grammars.compile(Grammar(GrammarKind.JSON_SCHEMA, nested(depth)))
        assert refused.value.message == message


def test_a_choice_is_taken_literally_and_may_be_one_of_thousands(tiny: FrozenModel) -> None:
    texts = ["a.b*c", "(d|e)", "[f]^$", "x{2}", "é 😀", "#&-~/"]
    for text in texts:
        asked = request("r", [1], grammar=Grammar(GrammarKind.CHOICE, json.dumps([text])), max_new_tokens=60)
        assert run_engine(make_engine(tiny), [(asked, None)])["r"].text == text
    many = Grammar(GrammarKind.CHOICE, json.dumps([f"v{i}x" for i in range(4000)]))
    outcome = run_engine(make_engine(tiny), [(request("r", [1], grammar=many, max_new_tokens=60), None)])["r"]
    assert outcome.text in json.loads(many.source)


OBJECTS = [{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(2500)]
TOO_COMPLEX = {
    "lexer": Grammar(GrammarKind.REGEX, "(a?){500}a{500}"),
    "parser": Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"anyOf": OBJECTS})),
}
"""Grammars that are taken, and of which the first token or two show that too much has to be kept in mind."""


@pytest.mark.parametrize("grammar", TOO_COMPLEX.values(), ids=TOO_COMPLEX)
def test_a_grammar_that_proves_too_complex_is_the_clients_error_and_nobody_elses(
    tiny: FrozenModel, grammar: Grammar
) -> None:
    asked = [
        (request("hard", [1], grammar=grammar, max_new_tokens=60), None),
        (request("r", [1], max_new_tokens=5, ignore_eos=True), None),
    ]
    outcomes = run_engine(make_engine(tiny), asked)
    assert len(outcomes["r"].token_ids) == 5
    error = outcomes["hard"].error
    assert isinstance(error, InvalidRequest)
    assert "too complex" in str(error)
    assert "<state>" not in str(error)


def test_a_dead_end_of_a_grammar_is_called_one(tiny: FrozenModel) -> None:
    grammar = Grammar(GrammarKind.LARK, 'start: "a" NEVER\nNEVER: /b/ & /c/')
    error = run_engine(make_engine(tiny), [(request("r", [1], grammar=grammar, max_new_tokens=9), None)])["r"].error
    assert isinstance(error, InvalidRequest)
    assert str(error).startswith("The grammar has a dead end: no token can follow")


def test_only_so_many_grammars_are_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.grammars.compiled.MAX_UNUSED_MIB", 2**20)  # each takes what the machine gives
    for i in range(MAX_UNUSED + 10):
        first(grammars, Grammar(GrammarKind.REGEX, f"a{{{i + 1}}}"))
        first(grammars, DATE)
    assert len(grammars._compiled) == MAX_UNUSED
    kept = grammars.hold(DATE)
    assert kept is not None
    grammars.release(kept)
    assert grammars.hold(Grammar(GrammarKind.REGEX, "a{1}")) is None
    assert first(grammars, Grammar(GrammarKind.REGEX, "a{1}")).any()


def test_many_threads_may_ask_at_once(grammars: Grammars) -> None:
    def ask(seed: int) -> bool:
        asked = [(DATE, ANIMAL, PERSON)[(seed + i) % 3] for i in range(20)]
        return all(first(grammars, grammar).any() for grammar in asked)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
