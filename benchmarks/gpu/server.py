"""`prelude serve` with random weights in a separate process, with faults that files trigger.

    python -m benchmarks.gpu.server FOLDER [--rehearse] [--tiny]

The folder contains the store, the log, the port (once the server listens), and optionally two files. With `oom`, steps
of more than `LARGE` input tokens run out of memory; with `assert`, the next step reads a row that does not exist on the
device, which destroys its context.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = ("fastapi", "uvicorn", "structlog", "typer", "watchfiles", "prometheus_client", "multipart", "httptools")
LARGE = 64


class Server:
    """A running server process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    def status_of(self, path: str) -> int | None:
        """The status of a GET request; None without a reply."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as exc:
            return int(exc.code)
        except OSError:
            return None


@contextlib.contextmanager
def serving(folder: Path, seconds: float, *, rehearse: bool, tiny: bool) -> Iterator[Server]:
    """Context manager: start a server and wait until it is ready; at the end it is killed if it still runs."""
    command = [sys.executable, "-m", "benchmarks.gpu.server", str(folder), *["--rehearse"] * rehearse]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    process = subprocess.Popen([*command, *["--tiny"] * tiny], cwd=ROOT, env=environment)
    try:
        end = time.monotonic() + seconds
        port = folder / "port"
        while not (port.exists() and Server(process, int(port.read_text())).status_of("/ready") == 200):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not start; status {process.poll()}, its log is above")
            time.sleep(0.1)
        yield Server(process, int(port.read_text()))
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sys.path.insert(1, str(Path(__file__).parents[1]))

    from server.openmp import bound_primitives, expand_segments, share_cores

    for prepare in (share_cores, bound_primitives, expand_segments):  # before torch
        prepare()
    import torch
    from random_llama import make_module, model_with_bytes

    from server import serve as serving_
    from server.cli.logs import configure_logging
    from server.engine.attention.interface import ATTENTION_NAME, register_attention
    from server.engine.build_engine import build_engine
    from server.engine.engine import Engine
    from server.engine.fast.optimise import load_kernels, optimise
    from server.settings import Settings

    def start_engine(settings: Settings) -> Engine:
        device = torch.device("cpu" if options.rehearse else "cuda")
        register_attention()
        module = make_module(ATTENTION_NAME, device, tiny=options.rehearse or options.tiny)
        model = model_with_bytes(module, settings.max_model_len)
        optimise(model, settings.optimisations, load_kernels(model, settings.optimisations, None))
        engine = build_engine(settings, model)
        serving_.warm_up(engine)
        _allow_misfortunes(engine, options.folder)
        return engine

    def bind(host: str, port: int) -> Any:
        listener = bind_(host, port)
        (options.folder / "port").write_text(str(listener.getsockname()[1]))
        return listener

    bind_, serving_.bind, serving_.start_engine = serving_.bind, bind, start_engine
    sizes: dict[str, Any] = {"max_sequences": 256, "max_model_len": 1024, "max_batch_tokens": 8192}
    if options.rehearse:
        sizes = {"max_sequences": 16, "max_model_len": 512, "max_batch_tokens": 256, "kv_memory": "16MiB"}
    settings = Settings.load(port=0, prompts_dir=options.folder / "prompts", **sizes)
    configure_logging(settings.log_level, settings.log_format)
    serving_.serve(settings)


def _allow_misfortunes(engine: Any, folder: Path) -> None:
    """See the module's docstring."""
    import torch

    model, device = engine.model, engine.model.device
    forward = model.forward

    def misfortunate(inputs_embeds: Any, *others: Any) -> Any:
        if len(inputs_embeds) > LARGE and (folder / "oom").exists():
            if device.type == "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory, in a rehearsal.")
            torch.empty(2**40, dtype=torch.uint8, device=device)  # a terabyte, from torch's own allocator
        if (folder / "assert").exists():
            torch.zeros(1, device=device)[torch.tensor([7], device=device)]  # a CPU raises at once
        return forward(inputs_embeds, *others)

    model.forward = misfortunate
    if engine.runner.graphs is not None:  # a replay calls no Python
        replay = engine.runner.graphs.run

        def run(*given: Any) -> Any:
            if (folder / "assert").exists():
                torch.zeros(1, device=device)[torch.tensor([7], device=device)]
            return replay(*given)

        engine.runner.graphs.run = run


def body(text: str, tokens: int, **parameters: Any) -> bytes:
    """The body of a request for a stream; each byte of the text is a token."""
    asked = {"max_new_tokens": tokens, "ignore_eos_token": True, **parameters}
    return json.dumps({"inputs": text, "parameters": asked}).encode()


if __name__ == "__main__":
    main()
