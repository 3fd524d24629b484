from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import server

ROOT = Path(server.__file__).parents[1]
SERVER = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "server").rglob("*.py"))}


def defined_twice(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Public classes that several of these files define, each with its files."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return {name: files for name, files in found.items() if len(files) > 1}


def test_the_checks_below_see_what_they_look_for() -> None:
    assert defined_twice(
        {"a": "class A: pass\nclass B: pass", "b": "class A: pass\nclass _C: pass", "c": "class _C: 0"}
    ) == {"A": ["a", "b"]}
    assert len(SERVER) > 30


def test_no_two_classes_have_one_name() -> None:
    assert not defined_twice(SERVER)
