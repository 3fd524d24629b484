from __future__ import annotations

import ast
import functools
import graphlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import server

ROOT = Path(server.__file__).parent
FILES = {".".join(["server", *path.relative_to(ROOT).with_suffix("").parts]): path for path in ROOT.rglob("*.py")}

BOTTOM = {"contracts", "errors", "garbage", "replies", "background_service", "settings", "validation"}
BELOW_CLI = BOTTOM | {
    "soft_prompts",
    "registry",
    "engine",
    "api",
    "train",
    "evaluation",
    "interpret",
    "data_dir",
    "durable",
    "executors",
    "log_lines",
    "long_work",
    "jobs",
    "serve",
    "keys",
}
COMMAND = BOTTOM | {"cli.errors", "cli.logs"}
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "contracts": set(),
    "errors": set(),
    "settings": {"errors", "validation"},
    "openmp": set(),
    "huge_pages": set(),
    "__main__": {"cli", "huge_pages"},
    "executors": {"errors"},
    "garbage": set(),
    "log_lines": set(),
    "validation": set(),
    "background_service": set(),
    "replies": {"validation"},
    "long_work": {"errors", "executors"},
    "soft_prompts": BOTTOM,
    "registry": BOTTOM | {"durable", "executors", "soft_prompts"},
    "engine": BOTTOM | {"soft_prompts", "executors"},
    "durable": {"errors"},
    "train": BOTTOM | {"durable", "soft_prompts", "engine"},
    "data_dir": {"errors"},
    "jobs": BOTTOM
    | {"durable", "keys", "log_lines", "openmp", "soft_prompts", "registry", "engine", "train", "interpret"},
    "evaluation": BOTTOM | {"durable", "soft_prompts", "engine", "train", "executors", "long_work"},
    "interpret": BOTTOM | {"durable", "soft_prompts", "engine", "train", "evaluation", "executors", "long_work"},
    "keys": {"errors", "durable", "validation"},
    "api": BOTTOM
    | {
        "data_dir",
        "durable",
        "executors",
        "long_work",
        "soft_prompts",
        "registry",
        "engine",
        "train",
        "evaluation",
        "interpret",
        "jobs",
        "keys",
    },
    "client": BOTTOM | {"soft_prompts"},
    "serve": BELOW_CLI,
    "deploy": BELOW_CLI | {"openmp", "huge_pages"},
    "cli": {"cli.main"},
    "cli.errors": BOTTOM,
    "cli.logs": {"log_lines"},
    "cli.options": BOTTOM,
    "cli.files": BOTTOM | {"soft_prompts"},
    "cli.diff": BOTTOM | {"soft_prompts", "cli.files"},
    "cli.bars": {"client", "train"},
    "cli.tables": BOTTOM | {"client", "keys", "cli.bars", "cli.errors", "cli.files", "cli.diff"},
    "cli.remote": BOTTOM | {"client", "cli.errors"},
    "cli.references": BOTTOM | {"soft_prompts", "client", "cli.diff", "cli.errors", "cli.files", "cli.tables"},
    "cli.prompts": COMMAND
    | {"soft_prompts", "client", "cli.files", "cli.diff", "cli.references", "cli.remote", "cli.tables"},
    "cli.jobs": COMMAND | {"client", "cli.bars", "cli.remote", "cli.tables"},
    "cli.keys": COMMAND | {"keys", "cli.tables"},
    "cli.train_options": {"soft_prompts", "train"},
    "cli.train": COMMAND
    | {
        "soft_prompts",
        "engine",
        "train",
        "interpret",
        "cli.bars",
        "cli.files",
        "cli.jobs",
        "cli.options",
        "cli.train_options",
    },
    "cli.task_source": BOTTOM | {"soft_prompts", "registry", "cli.references", "cli.remote"},
    "cli.scores": {"cli.tables", "evaluation"},
    "cli.evaluate_options": set(),
    "cli.evaluate": COMMAND
    | {
        "soft_prompts",
        "engine",
        "evaluation",
        "cli.card_section",
        "cli.evaluate_options",
        "cli.files",
        "cli.options",
        "cli.scores",
        "cli.tables",
        "cli.task_source",
    },
    "cli.card_section": BOTTOM | {"soft_prompts", "engine", "evaluation", "interpret"},
    "cli.inspect_options": set(),
    "cli.inspection_tables": {"cli.tables", "interpret"},
    "cli.inspection": COMMAND
    | {
        "contracts",
        "soft_prompts",
        "engine",
        "evaluation",
        "interpret",
        "cli.inspect_options",
        "cli.inspection_tables",
        "cli.options",
        "cli.references",
        "cli.remote",
        "cli.results_file",
        "cli.task_source",
    },
    "cli.results_file": {"errors", "cli.tables"},
    "cli.prune_options": set(),
    "cli.prune": COMMAND
    | {"soft_prompts", "engine", "registry", "evaluation", "interpret", "cli.options", "cli.prune_options"}
    | {"cli.inspection_tables", "cli.remote", "cli.results_file", "cli.task_source"},
    "cli.main": COMMAND
    | {
        "serve",
        "openmp",
        "cli.options",
        "cli.prompts",
        "cli.jobs",
        "cli.keys",
        "cli.train",
        "cli.evaluate",
        "cli.inspection",
        "cli.prune",
    },
}
"""What each part of `server` may import beside itself; a new part has to be given its place here."""
IN_MODULES = ("cli",)
"""Packages that are no one part: each of their modules is."""
WEB = ("api", "deploy", "serve", "cli", "client")
"""The parts that speak HTTP."""


def part_of(name: str) -> str:
    """The part that a module or a name belongs to: `engine` for server.engine.model.frozen; "" for the package."""
    _, part, *rest = name.split(".")
    if part in IN_MODULES and rest and f"server.{part}.{rest[0]}" in FILES and rest[0] != "__init__":
        return f"{part}.{rest[0]}"
    return part if part in {module.split(".")[1] for module in FILES} - {"__init__"} else ""


@functools.cache
def nodes_of(source: str) -> list[ast.Import | ast.ImportFrom | ast.Attribute]:
    """The parts of a file that the checks look at; it is parsed once for all of them."""
    kinds = ast.Import | ast.ImportFrom | ast.Attribute
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def imports_of(source: str, module: str = "server.x") -> Iterator[str]:
    """Full names of what a file imports, wherever in it the import stands."""
    package = module.split(".")[:-1]
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module of `server` that an imported name belongs to: the longest one that the name begins with."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in FILES:
                return module
        name = name.rpartition(".")[0]
    return None


def circle_in(graph: Mapping[str, Iterable[str | None]]) -> list[str] | None:
    """Modules of which each imports the next one, and the last one the first; None if there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as exc:
        circle: list[str] = exc.args[1]
        return circle
    return None


def reads_environment(source: str) -> bool:
    """True if a file touches the environment's variables."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    attributes = (node.attr for node in nodes_of(source) if isinstance(node, ast.Attribute) and in_os(node))
    imported = (name.removeprefix("os.") for name in imports_of(source) if name.startswith("os."))
    return bool(names & {*attributes, *imported})


def in_os(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "os"


def test_the_checks_below_see_what_they_look_for() -> None:
    assert set(imports_of("import a.b\nfrom server.api import app\ndef f():\n    from . import c, d")) == {
        "a.b",
        "server.api.app",
        "server.c",
        "server.d",
    }
    assert list(imports_of("from ..engine import model", "server.api.tgi")) == ["server.engine.model"]
    assert part_of("server.engine.model.frozen.FrozenModel") == part_of("server.engine.__init__") == "engine"
    assert part_of("server.cli.files.Upload") == part_of("server.cli.files") == "cli.files"
    assert part_of("server.cli.app") == part_of("server.cli.__init__") == "cli"
    assert part_of("server.__version__") == part_of("server.__init__") == ""
    assert module_of("server.engine.model.frozen.FrozenModel") == "server.engine.model.frozen"
    assert module_of("server.engine.model") == "server.engine.model.__init__"
    assert module_of("torch.nn") is None
    assert list(imports_of("if TYPE_CHECKING:\n    from server.a import b")) == ["server.a.b"]
    assert circle_in({"a": {"b", None}, "b": {"c"}}) is None
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) or ()) == {"b", "c"}
    assert reads_environment("import os\nos.environ['A']")
    assert reads_environment("from os import getenv")
    assert not reads_environment("import os\nos.replace('a', 'b')")
    assert len(FILES) > 30


def test_the_order_names_the_parts_that_there_are() -> None:
    assert {part_of(module) for module in FILES} | {"cli"} == set(MAY_IMPORT)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {found for name in imports_of(path.read_text(), module) if (found := module_of(name)) != module}
        for module, path in FILES.items()
    }
    assert circle_in(graph) is None


def imported_by(module: str) -> set[str]:
    """The packages that a module imports from, wherever they come from."""
    return {name.split(".")[0] for name in imports_of(FILES[module].read_text(), module)}


def test_imports_go_only_in_the_direction_of_the_design() -> None:
    wrong = {}
    for module, path in FILES.items():
        part = part_of(module)
        used = {part_of(name) for name in imports_of(path.read_text(), module) if name.startswith("server.")}
        wrong[module] = used - MAY_IMPORT[part] - {part, ""}
    assert {module: parts for module, parts in wrong.items() if parts} == {}


def test_the_edge_does_not_import_torch() -> None:
    edge = [module for module in FILES if part_of(module) == "api"]
    assert len(edge) > 30
    assert [module for module in edge if "torch" in imported_by(module)] == []


def test_only_the_edge_knows_of_http() -> None:
    web = {"fastapi", "starlette", "uvicorn", "httpx", "sse_starlette"}
    inner = [module for module in FILES if part_of(module).split(".")[0] not in WEB]
    assert len(inner) > 30
    assert {module: found for module in inner if (found := web & imported_by(module))} == {}


@pytest.mark.parametrize(
    ("package", "seen_by"),
    [
        ("prometheus_client", ("server.api.telemetry.", "server.deploy.")),
        ("ray", ("server.deploy.",)),
        ("structlog", ("server.api.telemetry.", "server.cli.logs")),
    ],
)
def test_only_the_edge_knows_who_looks_at_the_server_from_outside(package: str, seen_by: tuple[str, ...]) -> None:
    importing = [module for module in FILES if package in imported_by(module)]
    assert importing
    assert [module for module in importing if not module.startswith(seen_by)] == []


def test_no_module_is_named_after_one_of_the_standard_library() -> None:
    names = {module: set(module.split(".")[1:]) - {"__init__"} for module in FILES}
    assert [module for module, parts in names.items() if parts & sys.stdlib_module_names] == []


def test_the_environment_is_read_in_one_place() -> None:
    reading = {module for module, path in FILES.items() if reads_environment(path.read_text())}
    assert reading == {
        "server.settings",
        "server.openmp",
        "server.huge_pages",
        "server.deploy.ray_environment",
    }
