"""Grammars for generated text, by llguidance: which tokens may come next, given what has come.

A grammar is compiled once and kept; every sequence walks on a copy of its own. To compile one takes milliseconds for a
usual schema, but seconds for a hostile one, so it is done off the event loop and off the engine's thread, within the
limits that llguidance sets to the size of what it builds.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import llguidance
import numpy as np
from tokenizers import Tokenizer

from server.core import TOO_DEEP, Grammar, GrammarKind
from server.errors import InvalidRequest

META = frozenset("\\.+*?()|[]{}^$#&-~/")
"""Characters that mean something in a regular expression."""

NAMES = {
    GrammarKind.JSON_SCHEMA: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "choice",
    GrammarKind.LARK: "Lark grammar",
    GrammarKind.EBNF: "EBNF grammar",
}

KEPT = 64
"""Compiled grammars; the one that was used last stays longest."""

ONE_SPACE: Any = {"whitespace_pattern": " ?"}
"""Between the parts of a JSON text. Were any number allowed, a small model could go on with blanks for ever."""


class Matcher:
    """One sequence's way through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        """Start at its beginning; nobody else may use this matcher."""
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next, `[vocab_size]` of booleans; none once it has failed."""
        allowed = np.zeros(vocab_size, dtype=bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():  # also if only just now: its mask then lets the text end
            return allowed
        known = np.unpackbits(bits, count=min(vocab_size, 8 * len(bits)), bitorder="little").view(bool)
        allowed[: len(known)] = known
        return allowed

    def accept(self, token_id: int) -> None:
        """Take the token that came."""
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing can be added to it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why it cannot go on: the grammar turned out to be too complex."""
        return brief(self._matcher.get_error()) if self._matcher.is_error() else None


class Grammars:
    """Compiled grammars for one tokenizer; safe from any thread."""

    def __init__(self, backend: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Nothing is built before the first grammar: llguidance's view of the tokenizer takes a second."""
        self._backend = backend
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar, if it is not here yet.

        Raises:
            InvalidRequest: it cannot be used; says why.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return
        matcher = llguidance.LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        self._try_out(grammar, matcher.deep_copy())
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new walk through a grammar.

        Raises:
            InvalidRequest: as `check`, where it was not called before.
        """
        while True:
            with self._lock:
                if (compiled := self._compiled.get(grammar)) is not None:
                    return Matcher(compiled.deep_copy())
            self.check(grammar)

    def _try_out(self, grammar: Grammar, matcher: llguidance.LLMatcher) -> None:
        """Refuse a grammar that fails at once, or whose first token cannot be found; the empty text has none."""
        if matcher.is_accepting():
            return
        allowed = Matcher(matcher).allowed(self._vocab_size)
        if matcher.is_error() and not matcher.get_error().startswith("NoExtension"):
            raise _unusable(grammar, matcher.get_error())
        allowed[self._eos_token_ids] = False
        if not allowed.any():
            raise _unusable(grammar, "No text can match it.")

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        # It wants room for all that the tokenizer knows, also tokens that the model has no row for.
        known = max(self._backend.get_vocab().values()) + 1
        return llguidance.LLTokenizer(
            self._backend.to_str(), n_vocab=max(self._vocab_size, known), eos_token=self._eos_token_ids or None
        )


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own form."""
    try:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            source: str = llguidance.LLMatcher.grammar_from_json_schema(grammar.source, overrides=ONE_SPACE)
        elif grammar.kind is GrammarKind.REGEX:
            # As ECMA 262 and thus JSON schemas' patterns read it: \d and \w are ASCII.
            source = llguidance.LLMatcher.grammar_from_regex(llguidance.regex_to_lark(grammar.source, "dw"))
        elif grammar.kind is GrammarKind.LARK:
            source = llguidance.LLMatcher.grammar_from_lark(grammar.source)
        elif grammar.kind is GrammarKind.EBNF:
            source = llguidance.grammar_from("ebnf", grammar.source)
        else:
            # One expression, not a rule for each: the parser keeps no more than 2,000 of those in mind.
            source = llguidance.LLMatcher.grammar_from_regex("|".join(map(_literally, json.loads(grammar.source))))
    except ValueError as exc:
        raise _unusable(grammar, str(exc)) from exc
    return _after_space(source) if grammar.after_space else source


def _after_space(source: str) -> str:
    """The same grammar after a space, so that the first token may be the one that training puts there."""
    parts = json.loads(source) if source.startswith("{") else {"grammars": [{"lark_grammar": source}]}
    first, *others = parts["grammars"]
    return json.dumps(
        parts | {"grammars": [{"lark_grammar": 'start: " " @matched'}, first | {"name": "matched"}, *others]}
    )


def _literally(text: str) -> str:
    """A regular expression that only this text matches."""
    return "(?:" + "".join(f"\\{c}" if c in META else c for c in text) + ")"


def brief(why: str) -> str:
    """llguidance's words without the state of its parser, on one line, without the full stop."""
    return " ".join(why.partition("<state>")[0].split())[:300].rstrip(" .")


def _unusable(grammar: Grammar, why: str) -> InvalidRequest:
    if grammar.kind is GrammarKind.JSON_SCHEMA and "recursion limit exceeded" in why:
        why = TOO_DEEP  # instead of a place in a text that nobody has written
    return InvalidRequest(
        f"The {NAMES[grammar.kind]} cannot be used: {brief(why)}.",
        remedy="Mend or simplify it; JSON schemas as of draft 2020-12, regular expressions without look-around, "
        "EBNF in GBNF's form with a rule named root, Lark with a rule named start.",
    )
