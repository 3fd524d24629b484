"""The documentation cannot fall behind: every setting, route, error and event of the tree is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ByteSize

from server import errors
from server.api.app import create_app
from server.contracts import MAX_SCHEMA_DEPTH
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import ENV_PREFIX, Settings
from tests.registry.fakes import MemoryObjects
from tests.support import make_engine

ROOT = Path(__file__).parents[1]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented_with_its_option_and_default(name: str) -> None:
    rows = [line for line in read("docs/configuration.md").splitlines() if f"| `{ENV_PREFIX}{name.upper()}` |" in line]
    assert len(rows) == 1
    assert f"`--{name.replace('_', '-')}`" in rows[0]
    default = Settings.model_fields[name].get_default()
    if isinstance(default, (str, int, float)) and not isinstance(default, ByteSize):
        assert f"`{default:g}`" in rows[0] if isinstance(default, float) else f"`{default}`" in rows[0]


def test_no_setting_is_documented_that_does_not_exist() -> None:
    documented = [line.split("`")[1] for line in read("docs/configuration.md").splitlines() if line.startswith("| `")]
    assert documented == [ENV_PREFIX + name.upper() for name in Settings.model_fields]


def every_error() -> list[type[errors.PreludeError]]:
    found, queue = [], [errors.PreludeError]
    while queue:
        found.append(cls := queue.pop())
        queue += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_is_documented_with_its_status(cls: type[errors.PreludeError]) -> None:
    rows = [
        line for line in read("docs/errors.md").splitlines() if line.startswith(f"| `{cls.code}` | `{cls.__name__}`")
    ]
    assert len(rows) == 1
    status = rows[0].split("|")[3].strip()
    assert status == str(cls.status) or not status.isdigit()


def test_every_route_is_documented_and_no_other(tiny: FrozenModel) -> None:
    registry = Registry(Store(MemoryObjects()), tiny.spec, 512)
    app = create_app(Settings(), EngineWorker(make_engine(tiny)), registry)
    routes = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    documented = set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", read("docs/http_api.md"), re.MULTILINE))
    assert documented == routes


def test_how_deeply_a_schema_may_be_nested_is_documented() -> None:
    assert f"nested {MAX_SCHEMA_DEPTH} deep" in read("docs/http_api.md").replace("\n", " ")


def drawn_modules() -> list[str]:
    """Paths of the modules in the tree of the architecture page."""
    tree = re.search(r"^    server/\n((?:      .*\n)+)", read("docs/architecture.md"), re.MULTILINE)
    assert tree is not None
    found = []
    folders: dict[int, str] = {}  # by their indentation
    for line in tree[1].splitlines():
        indentation, first = len(line) - len(line.lstrip()), line.split()[0]
        folders = {depth: name for depth, name in folders.items() if depth < indentation}
        if first.endswith("/"):
            folders[indentation] = first
        found += ["".join(folders.values()) + name for name in re.findall(r"\w+\.py", line)]
    return found


def test_the_architecture_page_draws_every_module_and_no_other() -> None:
    server = ROOT / "server"
    modules = {path.relative_to(server).as_posix() for path in server.rglob("*.py") if path.stem != "__init__"}
    drawn = drawn_modules()
    assert sorted(modules ^ set(drawn)) == []
    assert len(drawn) == len(modules)


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_documents_lead_somewhere() -> None:
    for page in ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", read(page)):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page} links to {path}"
            assert not anchor or anchor in headings(target), f"{page} links to {path}#{anchor}"


def python_files() -> list[str]:
    """Paths of all Python files of the project, each with a slash in front."""
    folders = ("server", "tests", "benchmarks", "examples", "deploy")
    return [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/decisions.md", "docs/models.md"])
def test_every_python_file_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`([\w/]+\.py)`", read(page))
    existing = python_files()
    assert named
    assert [name for name in named if "NAME" not in name and not any(p.endswith(f"/{name}") for p in existing)] == []


def prose_lines(page: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a page, without tables, blocks of code and pictures, which cannot be broken."""
    in_block = False
    for number, line in enumerate(read(page).splitlines(), 1):
        in_block ^= line.lstrip().startswith("```")
        if not in_block and not line.lstrip().startswith(("```", "|", "![")) and not line.startswith("    "):
            yield number, line


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if "<!-- prelude eval: card -->" not in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_prose_is_wider_than_120_columns(page: str) -> None:
    """Ruff holds the same for code, comments and docstrings."""
    assert [f"{page}:{number}" for number, line in prose_lines(page) if len(line) > 120] == []
