from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import server

ROOT = Path(server.__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("server", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SERVER = {name: source for name, source in FILES.items() if name.startswith("server/")}

MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60


@functools.cache
def definitions(source: str) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a file, wherever in it they stand; it is parsed once for all checks."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def defined_twice(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Public classes that several of these files define, each with its files."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        for node in definitions(source):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return {name: files for name, files in found.items() if len(files) > 1}


def long_functions(source: str) -> dict[str, int]:
    """Functions that are too long, each with its lines from `def` to its end."""
    return {
        node.name: lines
        for node in definitions(source)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }


def test_the_checks_below_see_what_they_look_for() -> None:
    assert defined_twice(
        {"a": "class A: pass\nclass B: pass", "b": "class A: pass\nclass _C: pass", "c": "class _C: 0"}
    ) == {"A": ["a", "b"]}
    body = "    0\n" * (MOST_LINES_OF_A_FUNCTION - 1)
    assert long_functions(f"@x\ndef f():\n{body}") == {}
    assert long_functions(f"class A:\n  async def f():\n{body}    0") == {"f": MOST_LINES_OF_A_FUNCTION + 1}
    assert len(SERVER) > 30
    assert len(FILES) > len(SERVER) + 30


def test_no_two_classes_have_one_name() -> None:
    assert not defined_twice(SERVER)


def test_files_and_functions_are_short_enough_to_be_read_at_once() -> None:
    files = {name: lines for name, source in FILES.items() if (lines := source.count("\n")) > MOST_LINES_OF_A_FILE}
    assert not files
    functions = {name: found for name, source in FILES.items() if (found := long_functions(source))}
    assert not functions
