from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from server.cli import app
from server.errors import ConfigurationError
from server.settings import CLIENT_VARIABLES, ENV_PREFIX, Settings

VALUES: dict[str, tuple[str, Any]] = {
    "model": ("org/name", "org/name"),
    "model_name": ("ours", "ours"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "api_keys_file": ("/run/secrets/keys.json", Path("/run/secrets/keys.json")),
    "allow_anonymous": ("true", True),
    "allowed_hosts": ("GPU-box, 10.0.0.1,fe80::1", "gpu-box,10.0.0.1,fe80::1"),
    "cors_origins": ("https://App.example, http://localhost:3000", "https://app.example,http://localhost:3000"),
    "ui": ("0", False),
    "prompts_dir": ("/data/prompts", Path("/data/prompts")),
    "store": ("file:/data/store", "file:/data/store"),
    "jobs_dir": ("/data/jobs", Path("/data/jobs")),
    "data_dir": ("/data/rows", Path("/data/rows")),
    "sync_seconds": ("0.5", 0.5),
    "host_memory": ("2MiB", 2 * 2**20),
    "cache_dir": ("/data/cache", Path("/data/cache")),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("float32", "float32"),
    "optimise": ("fused,packed", "fused,packed"),
    "max_model_len": ("512", 512),
    "special_tokens_in_input": ("control", "control"),
    "max_sequences": ("3", 3),
    "max_queue": ("7", 7),
    "max_per_task": ("8", 8),
    "max_per_key": ("9", 9),
    "request_timeout": ("2.5", 2.5),
    "kv_memory": ("2GiB", 2 * 2**30),
    "prefix_memory": ("512MiB", 512 * 2**20),
    "max_batch_tokens": ("100", 100),
    "max_virtual_tokens": ("40", 40),
    "body_memory": ("16MiB", 2**24),
    "form_disk": ("512MiB", 2**29),
    "max_upload_bytes": ("1MiB", 2**20),
    "drain_seconds": ("1.5", 1.5),
    "metrics_tasks": ("7", 7),
    "tracing": ("true", True),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
}
"""Every setting: what is written, and what it means."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["api_keys_file", "prompts_dir", "jobs_dir", "data_dir", "cache_dir"])
def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv(ENV_PREFIX + name.upper(), "~/x")
    assert getattr(Settings.load(), name) == Path("/home/ada/x")
    monkeypatch.setenv(ENV_PREFIX + name.upper(), "~nobody-of-that-name/x")
    with pytest.raises(ConfigurationError, match="there is no user ~nobody-of-that-name"):
        Settings.load()


def test_the_table_above_holds_every_setting() -> None:
    assert set(VALUES) == set(Settings.model_fields)


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_comes_from_its_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, meaning = VALUES[name]
    assert getattr(Settings.load(), name) != meaning
    monkeypatch.setenv(ENV_PREFIX + name.upper(), text)
    assert getattr(Settings.load(), name) == meaning


@pytest.mark.parametrize("name", VALUES)
def test_an_option_beats_the_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, meaning = VALUES[name]
    default = Settings.load()
    variable = getattr(default, name)
    if variable is not None:
        monkeypatch.setenv(ENV_PREFIX + name.upper(), str(variable))
    assert getattr(Settings.load(**{name: text}), name) == meaning
    assert Settings.load(**{name: None}) == default, "an option that is not given changes nothing"


@pytest.mark.parametrize("name", ["PRELUDE_PROT", "PRELUDE_", "prelude_prot", "PRELUDE_MODEL_CONFIG"])
def test_a_misspelt_variable_is_an_error_that_names_it_and_lists_the_settings(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "9000")
    with pytest.raises(ConfigurationError, match=rf"Not a setting: {name}\.") as caught:
        Settings.load()
    assert all(ENV_PREFIX + setting.upper() in caught.value.remedy for setting in VALUES)


def test_variables_of_others_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRELUDES", "1")
    monkeypatch.setenv("MODEL", "other")
    assert Settings.load().model == "embedded"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "http"),
        ("port", "65536"),
        ("port", ""),
        ("dtype", "int8"),
        ("max_model_len", "8"),
        ("max_sequences", "0"),
        ("kv_memory", "much"),
        ("kv_memory", "2Zoll"),
        ("prefix_memory", ""),
        ("max_batch_tokens", "1.5"),
        ("max_upload_bytes", "1KB"),
        ("body_memory", "1MiB"),
        ("form_disk", "64KiB"),
        ("drain_seconds", "-1"),
        ("allowed_hosts", ""),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "gpu-box:8000"),
        ("allowed_hosts", "http://gpu-box"),
        ("cors_origins", ""),
        ("cors_origins", "app.example"),
        ("cors_origins", "https://app.example/"),
        ("cors_origins", "https://*.example"),
        ("cors_origins", "https://a.example https://b.example"),
        ("cors_origins", "null"),
        ("metrics_tasks", "-1"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
@pytest.mark.parametrize("source", ["variable", "option"])
def test_a_wrong_value_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, source: str
) -> None:
    options = {name: text} if source == "option" else {}
    if source == "variable":
        monkeypatch.setenv(ENV_PREFIX + name.upper(), text)
    with pytest.raises(ConfigurationError, match=rf"Cannot use these settings: PRELUDE_{name.upper()}: ") as caught:
        Settings.load(**options)
    assert "prelude serve --help" in caught.value.remedy


def test_an_option_that_is_no_setting_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="PRELUDE_PROT: "):
        Settings.load(prot=9000)


@pytest.mark.parametrize(
    ("text", "size"), [("auto", "auto"), ("2GiB", 2**31), ("512MiB", 2**29), ("1.5GB", 1_500_000_000), ("4096", 4096)]
)
def test_sizes_are_written_as_people_write_them(text: str, size: int | str) -> None:
    settings = Settings.load(kv_memory=text, prefix_memory=text)
    assert (settings.kv_memory, settings.prefix_memory) == (size, size)


def test_the_store_lies_in_the_inbox_unless_it_is_named() -> None:
    assert Settings.load().store_url == "file:prompts/.store"
    assert Settings.load(prompts_dir="/data").store_url == "file:/data/.store"
    assert Settings.load(prompts_dir="/data", store="file:/other").store_url == "file:/other"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().port = 1  # type: ignore[misc]


def test_every_setting_is_an_option_of_serve_and_its_help_names_the_variable_and_the_default() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts} - {"--help"}
    assert options == {"--" + name.replace("_", "-") for name in Settings.model_fields}
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for name in Settings.model_fields:
        [line] = [line for line in shown.splitlines() if f"--{name.replace('_', '-')} " in line]
        assert f"(env: {ENV_PREFIX}{name.upper()}" in line
    assert "default: 127.0.0.1)" in shown
    assert "default: 64.0MiB)" in shown


def test_a_shell_that_is_set_up_for_prelude_prompts_can_start_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLIENT_VARIABLES:
        monkeypatch.setenv(name, "x")
    Settings.load()
    monkeypatch.setenv("PRELUDE_URLS", "x")
    with pytest.raises(ConfigurationError, match="PRELUDE_URLS"):
        Settings.load()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("all", {"compiled", "fused", "graphs", "packed"}),
        ("none", set()),
        ("fused, compiled", {"fused", "compiled"}),
        ("graphs", {"graphs"}),
    ],
)
def test_each_optimisation_can_be_switched_off(text: str, parts: set[str]) -> None:
    assert Settings.load(optimise=text).optimisations == parts


@pytest.mark.parametrize("text", ["all,none", "none,fused", "fast", ""])
def test_an_optimisation_that_there_is_not_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ConfigurationError, match="neither all nor none nor some of compiled, fused, graphs, packed"):
        Settings.load(optimise=text)


def test_hosts_and_origins_are_sets_and_without_them_there_are_none() -> None:
    settings = Settings.load(allowed_hosts="a,b", cors_origins="https://a.example,*")
    assert settings.hosts == frozenset({"a", "b"})
    assert settings.origins == {"https://a.example", "*"}
    assert (Settings.load().hosts, Settings.load().origins) == (None, frozenset())
