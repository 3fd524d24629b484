"""The page is small, and has no script or style that its policy would block."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

DIST = Path(__file__).parents[2] / "server/web/dist"
pytestmark = pytest.mark.skipif(not (DIST / "index.html").exists(), reason="needs the page: make page")

MOST_SCRIPT = 120_000
MOST_FIRST_SCRIPT = 60_000
MOST_STYLE = 15_000


def gzipped(pattern: str) -> dict[str, int]:
    """Sizes of the files of a kind, as they are sent at most."""
    return {path.name: len(gzip.compress(path.read_bytes())) for path in (DIST / "playground").glob(pattern)}


def test_all_that_a_browser_loads_stays_within_its_budget() -> None:
    scripts = gzipped("*.js")
    assert sum(scripts.values()) <= MOST_SCRIPT
    assert sum(gzipped("*.css").values()) <= MOST_STYLE
    first = {name: size for name, size in scripts.items() if name.startswith(("index-", "Compare-")) or is_shared(name)}
    assert sum(first.values()) <= MOST_FIRST_SCRIPT


def is_shared(name: str) -> bool:
    """Whether the first view imports a file."""
    return any(name in path.read_text() for path in (DIST / "playground").glob("Compare-*.js"))


def test_the_page_has_no_script_and_no_style_of_its_own() -> None:
    page = (DIST / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style| on\w+=| style=", page)
    assert all(address.startswith(("./", "data:,")) for address in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_each_file_has_both_smaller_forms() -> None:
    for path in DIST.rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            assert gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes()) == path.read_bytes()
            assert path.with_name(f"{path.name}.br").exists()
