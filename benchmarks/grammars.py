"""Measures the cost of grammars with llguidance, which Prelude uses, and with xgrammar, an alternative.

The figures for each grammar, with the tokenizer of the embedded model:

    compile   from the source to a usable matcher, the first time
    start     to another matcher of the same grammar, as each request needs one
    mask      accepting a token and computing the next mask, per text and token, in a batch of 32 texts at different
              positions; for llguidance, including the way to its process and back
    share     32 such masks relative to a decode step of 32 rows (25 ms on the machine of RESULTS.md)

    pip install xgrammar         # else only llguidance is measured
    python benchmarks/grammars.py

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from server.contracts import Grammar, GrammarKind
from server.engine.grammars.compiled import Grammars, unpacked
from server.engine.grammars.walks import Walks
from server.engine.model.frozen import FrozenModel
from server.settings import Settings

BATCH = 32
STEP_MS = 25.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
PERSON = {
    "name": "Ann Smith",
    "age": 42,
    "tags": ["red", "blue"],
    "address": {"street": "12 Long Street, Behind The Mill", "zip": "04109"},
}
LABELS = [f"intent number {i}" for i in range(77)]
CASES = {
    "JSON schema": (Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)), json.dumps(PERSON)),
    "any JSON object": (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}'), json.dumps(PERSON)),
    "regular expression": (
        Grammar(GrammarKind.REGEX, r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}, (19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"),
        "Grace Brewster Murray Hopper, 1906-12-09",
    ),
    "choice of 77": (Grammar(GrammarKind.CHOICE, json.dumps(LABELS)), LABELS[42]),
}


class Walk(Protocol):
    """A matcher to measure."""

    def mask(self) -> object:
        """Compute the tokens that may come next."""

    def accept(self, token_id: int) -> None:
        """Accept a token."""


class LLGuidance:
    """llguidance, as the engine uses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.grammars = Grammars(tokenizer.backend_tokenizer, vocab_size, eos)
        self.walks = Walks(self.grammars)
        self._begun = 0
        self.start(Grammar(GrammarKind.REGEX, "a"))  # starts the process that reads the tokenizer

    def forget(self) -> None:
        """Clear the cache, so that the next start compiles again."""
        for compiled in list(self.grammars._compiled.values()):  # noqa: SLF001
            self.grammars.discard(compiled)

    def start(self, grammar: Grammar) -> Walk:
        """A new walk."""
        self._begun += 1
        walks, vocab_size = self.walks, self.vocab_size
        [walk] = walks.begin(str(self._begun), self.grammars.compile(grammar), 1)

        class Walking:
            def mask(self) -> np.ndarray:
                return unpacked(walk.mask, vocab_size)

            def accept(self, token_id: int) -> None:
                walks.accept(walk, token_id, is_last=False)
                while walk.is_waiting:
                    walks.collect(also_slow=True)

        return Walking()


class XGrammar:
    """xgrammar, which fills a bit mask that is then unpacked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos: Sequence[int]) -> None:
        import xgrammar

        self._xgrammar: Any = xgrammar
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2)
        self.vocab_size = vocab_size
        self._compiled: dict[Grammar, Any] = {}

    def forget(self) -> None:
        """Clear the cache, so that the next start compiles again."""
        self._compiler.clear_cache()
        self._compiled.clear()

    def start(self, grammar: Grammar) -> Walk:
        """A new walk."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._compile(grammar)
        matcher = self._xgrammar.GrammarMatcher(self._compiled[grammar])
        bits = self._xgrammar.allocate_token_bitmask(1, self.vocab_size)
        vocab_size = self.vocab_size

        class Walking:
            def mask(self) -> np.ndarray:
                matcher.fill_next_token_bitmask(bits)
                return np.unpackbits(bits.numpy().view(np.uint8), count=vocab_size, bitorder="little").view(bool)

            def accept(self, token_id: int) -> None:
                matcher.accept_token(token_id)

        return Walking()

    def _compile(self, grammar: Grammar) -> Any:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            return self._compiler.compile_json_schema(grammar.source, any_whitespace=False)
        if grammar.kind is GrammarKind.REGEX:
            return self._compiler.compile_regex(grammar.source)
        texts = " | ".join(json.dumps(text) for text in json.loads(grammar.source))
        return self._compiler.compile_grammar(f"root ::= {texts}")


def timed(work: Callable[[], object], times: int) -> float:
    """Median time in milliseconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def measure(library: LLGuidance | XGrammar, grammar: Grammar, ids: Sequence[int]) -> dict[str, float]:
    """Measure one grammar with one library."""

    def compile_anew() -> None:
        library.forget()
        library.start(grammar).mask()

    compiled = timed(compile_anew, 5)
    started = timed(lambda: library.start(grammar), 50)
    walks = [library.start(grammar) for _ in range(BATCH)]
    places = [i * len(ids) // BATCH for i in range(BATCH)]
    for walk, place in zip(walks, places, strict=True):
        for token_id in ids[:place]:
            walk.mask()
            walk.accept(token_id)
    masks: list[float] = []
    for walk, place in zip(walks, places, strict=True):
        for token_id in ids[place:]:
            begun = time.perf_counter()
            walk.mask()
            walk.accept(token_id)
            masks.append(1000 * (time.perf_counter() - begun))
    mean = statistics.fmean(masks)
    return {
        "compile_ms": compiled,
        "start_ms": started,
        "mask_p50_ms": statistics.median(masks),
        "mask_p99_ms": float(np.percentile(masks, 99)),
        "share_percent": 100 * BATCH * mean / STEP_MS,
    }


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    model = FrozenModel.load(Settings.load())
    libraries: dict[str, type[LLGuidance] | type[XGrammar]] = {"llguidance": LLGuidance}
    if importlib.util.find_spec("xgrammar"):
        libraries["xgrammar"] = XGrammar
    result: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':<20}{'':<12}{'compile':>10}{'start':>8}{'mask p50':>10}{'p99':>8}   32 masks to a step")
    for name, kind in libraries.items():
        begun = time.perf_counter()
        library = kind(model.tokenizer, model.spec.vocab_size, sorted(model.eos_token_ids))
        print(f"{'tokenizer':<20}{name:<12}{1000 * (time.perf_counter() - begun):>7.0f} ms")
        for case, (grammar, text) in CASES.items():
            row = measure(library, grammar, model.tokenizer.encode(text, add_special_tokens=False))
            result.setdefault(case, {})[name] = row
            print(
                f"{case:<20}{name:<12}{row['compile_ms']:>7.1f} ms{row['start_ms']:>5.2f} ms"
                f"{row['mask_p50_ms']:>7.3f} ms{row['mask_p99_ms']:>5.2f} ms{row['share_percent']:>18.1f} %"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
