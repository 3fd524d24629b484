"""docker or podman, and a container of the image that runs under it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
IMAGE = "prelude-server:cpu"
START_SECONDS = 900
"""A first start converts the model and compiles kernels."""
DRAIN_SECONDS = 120
"""After a SIGTERM; on a busy machine a long stream needs more than the default."""
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp:size=256m", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--memory", "3g", "--memory-swap", "3g", "--pids-limit", "512"),
)


def soft_prompt(name: str) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of an upload, from a folder of the repository."""
    folder = ROOT / name
    names = ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
    return [("files", (name, (folder / name).read_bytes())) for name in names]


@dataclass
class Engine:
    """The command, with which all else is done."""

    command: str

    @classmethod
    def find(cls) -> Engine:
        """As deploy/build_image.sh finds it."""
        found = os.environ.get("ENGINE") or shutil.which("docker") or shutil.which("podman")
        assert found, "neither docker nor podman is installed; these tests need one of them"
        return cls(found)

    @property
    def is_podman(self) -> bool:
        return "podman" in self("--version")

    def __call__(self, *arguments: str, ok: tuple[int, ...] = (0,), timeout: float = 900) -> str:
        """Run it; what it wrote to stdout. Elsewhere than here, because podman leaves a file `oom` where it runs."""
        done = subprocess.run(
            [self.command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=tempfile.gettempdir(),
        )
        assert done.returncode in ok, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def build(self, tree: Path = ROOT, **variables: str) -> str:
        """Build the image from a tree; what the script wrote."""
        options = shlex.split(os.environ.get("BUILD_OPTIONS", ""))
        done = subprocess.run(
            [tree / "deploy/build_image.sh", "cpu", "--", *options],
            env={**os.environ, "ENGINE": self.command, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=3600,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def logs(self, name: str) -> str:
        """What a container wrote to stdout and to stderr."""
        command = [self.command, "logs", name]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=60
        )
        return done.stdout

    def service(self, name: str) -> str:
        """The id of the container that compose has started for a service."""
        (found,) = self("ps", "--quiet", "--filter", f"label=com.docker.compose.service={name}").split()
        return found

    def is_healthy(self, name: str) -> bool:
        """Whether its health check passes. Podman runs the check now, because it leaves the schedule to systemd."""
        if not self.is_podman:
            return bool(self.inspect(name)["State"]["Health"]["Status"] == "healthy")
        command = [self.command, "healthcheck", "run", name]
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name))[0]


@dataclass
class Running:
    """A container, its volumes and its keys."""

    engine: Engine
    name: str
    admin: str
    reader: str
    client: httpx.Client

    @classmethod
    @contextmanager
    def start(cls, engine: Engine, *options: str, command: Sequence[str] = (), cache: str = "") -> Iterator[Running]:
        """With keys and volumes of its own, until it is ready; all is removed in the end.

        `options` are the engine's, `command` replaces the image's, and `cache` is the volume of another container.
        """
        name = f"prelude-test-{uuid.uuid4().hex[:8]}"
        own = [f"{name}-{kind}" for kind in ("keys", "store", "cache")]
        volumes = [*own[:2], cache or own[2]]
        paths = ("/etc/prelude", "/var/lib/prelude", "/var/cache/prelude")
        mounts = [part for pair in zip(volumes, paths, strict=True) for part in ("--volume", ":".join(pair))]
        keys = ("--env", "PRELUDE_API_KEYS_FILE=/etc/prelude/keys.json", *mounts)
        try:
            made = [
                engine("run", "--rm", *HARDENED, *keys, IMAGE, "keys", "create", "--name", scope, "--scope", scope)
                for scope in ("admin", "generate")
            ]
            admin, reader = (next(word for word in text.split() if word.startswith("prelude_")) for text in made)
            drain = ("--env", f"PRELUDE_DRAIN_SECONDS={DRAIN_SECONDS}")
            publish = ("--publish", "127.0.0.1::8000")
            engine("run", "--detach", "--name", name, *HARDENED, *publish, *drain, *keys, *options, IMAGE, *command)
            with httpx.Client(timeout=120) as client:
                running = cls(engine, name, admin, reader, client)
                running.wait_until_ready()
                yield running
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                print(engine.logs(name))
            engine("rm", "--force", "--volumes", name, ok=(0, 1))
            engine("volume", "rm", "--force", *own, ok=(0, 1))

    def wait_until_ready(self) -> float:
        """Seconds that it took."""
        start = time.monotonic()
        published = self.engine("port", self.name, "8000").strip().splitlines()[0]  # a restart may change it
        self.client.base_url = httpx.URL(f"http://{published}")
        while True:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return time.monotonic() - start
            assert time.monotonic() - start < START_SECONDS, self.engine.logs(self.name)
            state = self.engine.inspect(self.name)["State"]
            assert state["Running"], self.engine.logs(self.name)
            time.sleep(0.5)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.admin}"}

    def execute(self, *command: str, ok: tuple[int, ...] = (0,)) -> str:
        return self.engine("exec", self.name, *command, ok=ok)

    def generate(self, task: str, text: str) -> httpx.Response:
        return self.client.post("/generate", params={"task": task}, json={"inputs": text}, headers=self.headers)
