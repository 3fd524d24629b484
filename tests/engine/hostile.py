"""Grammars that ask llguidance for more than any request may take, by what they take too much of."""

from __future__ import annotations

import json
from typing import Any

from server.contracts import Grammar, GrammarKind


def schema(value: Any) -> Grammar:
    """A JSON schema."""
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


def chain(length: int) -> Grammar:
    """Definitions each of which is the next one."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return schema({"$defs": links | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def multiples(first: int = 9973, second: int = 9967) -> Grammar:
    """Integers that are multiples of two large primes: one automaton of a hundred million states."""
    return schema({"allOf": [{"type": "integer", "multipleOf": first}, {"type": "integer", "multipleOf": second}]})


PATTERNS = schema({"type": "string", "allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(1, 20)]})
REQUIRED = schema({"type": "object", "required": [f"k{i}" for i in range(100_000)]})
LARGE = Grammar(GrammarKind.REGEX, "a{5000000}")
SLOW = Grammar(GrammarKind.REGEX, "a{100000}")
"""Compiled soon; then each mask looks through all that has to come."""


def _nested(depth: int) -> Any:
    inner: Any = {"type": "string"}
    for _ in range(depth):
        inner = {"allOf": [inner, {"type": "string"}]}
    return inner


ODD = {
    "allOf within allOf": schema(_nested(60)),
    "a cycle of definitions": schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "many patterns of properties": schema({"patternProperties": {f"^a{i}.*b.*c$": {} for i in range(200)}}),
    "a large enum": schema({"enum": [f"value {i}" for i in range(20_000)]}),
    "a long list": schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
    "a long text": schema({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}),
    "repetitions of repetitions": Grammar(GrammarKind.REGEX, "((a{1,100}){1,100}){1,100}"),
    "many alternatives": Grammar(GrammarKind.REGEX, "|".join(f"word{i}" for i in range(10_000))),
    "look-ahead": Grammar(GrammarKind.REGEX, "(?=a)(?=.*b).*"),
    "left recursion": Grammar(GrammarKind.LARK, 'start: start "a" | "b"'),
    "only recursion": Grammar(GrammarKind.LARK, "start: start"),
    "a huge repetition": Grammar(GrammarKind.LARK, 'start: "a"{1,1000000}'),
    "many blank lines": Grammar(GrammarKind.EBNF, "\n" * 20_000 + 'root ::= "a"'),
    "deep brackets": Grammar(GrammarKind.EBNF, "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "llguidance's own form": Grammar(GrammarKind.LARK, '{"grammars": [{"lark_grammar": "start: missing"}]}'),
}
"""What may be compiled or refused, if only it ends."""
