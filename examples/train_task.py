"""From a JSONL file to a live task, without leaving the server: train, watch, measure, ask.

    python examples/train_task.py --url http://127.0.0.1:8000 --task my_task --data train.jsonl --test test.jsonl

Each line of both files is {"input": "…", "target": "…"}. Start a server first (`make run`). Where it asks for keys, put
one with the scopes publish and generate into PRELUDE_API_KEY. Needs httpx, which Prelude brings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx


def main() -> None:
    """Train and measure what the options name."""
    parser = argparse.ArgumentParser(description="Train a soft prompt on a Prelude server, beside what it serves.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--task", required=True, help="its name from then on")
    parser.add_argument("--data", type=Path, required=True, help="rows to learn from")
    parser.add_argument("--test", type=Path, required=True, help="rows that training does not see")
    parser.add_argument("--config", type=json.loads, default={}, help='as JSON, such as {"steps": 300}; 600 by itself')
    options = parser.parse_args()
    headers = {"authorization": f"Bearer {os.environ['PRELUDE_API_KEY']}"} if "PRELUDE_API_KEY" in os.environ else {}
    with httpx.Client(base_url=options.url, headers=headers, timeout=600) as client:
        try:
            client.get("/ready").raise_for_status()
        except httpx.HTTPError as error:
            sys.exit(f"No server is ready at {options.url} ({error}). Start one: make run")
        job = train(client, options.task, options.data, options.config)
        if job["state"] != "succeeded":
            sys.exit(f"The job has {job['state']}: {job.get('error', {}).get('error', '')}")
        right, rows = job["metrics"]["validation_exact_match"], job["metrics"]["validation_rows"]
        print(f"live: {options.task}@{job['version']}, right on {right:.1%} of {rows} validation rows")
        for name, figure in measure(client, options.task, options.test).items():
            if name != "seconds":
                low, high = figure["interval"]
                print(f"{name}: {figure['value']:.3f} (95 % interval {low:.3f} to {high:.3f})")
        row = json.loads(options.test.read_text(encoding="utf-8").splitlines()[0])
        reply = client.post("/generate", params={"task": options.task}, json={"inputs": row["input"]})
        print(f"{row['input']!r}: {reply.raise_for_status().json()['generated_text']!r}")


def train(client: httpx.Client, task: str, data: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Queue a job, print how it goes, and answer what it came to."""
    spec = {"task": task, "config": config, "activate": True}
    with data.open("rb") as rows:
        reply = client.post("/training/jobs", data={"spec": json.dumps(spec)}, files={"data": rows})
    stop_if_refused(reply)
    shown = None
    with client.stream("GET", f"{reply.headers['location']}/events", timeout=None) as events:
        for line in events.iter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if event["event"] == "end":
                job: dict[str, Any] = event["job"]
                return job
            if event.get("validation") not in (None, shown):
                shown = event["validation"]
                print(f"step {event['step']}: validation loss {shown['loss']:.4f}, right on {shown['exact_match']:.1%}")
    raise RuntimeError("the events ended before the job")


def measure(client: httpx.Client, task: str, data: Path) -> dict[str, Any]:
    """Evaluate a task on rows that it has not seen, and answer the figures with their intervals."""
    with data.open("rb") as rows:
        reply = client.post("/evaluations", data={"task": task}, files={"data": rows})
    stop_if_refused(reply)
    evaluation = reply.json()
    while evaluation["state"] in ("waiting", "running"):
        time.sleep(0.2)
        evaluation = client.get(f"/evaluations/{evaluation['id']}").json()
    if evaluation["state"] != "done":
        sys.exit(str(evaluation))
    figures: dict[str, Any] = evaluation["result"]["contestants"][evaluation["contestants"][0]]
    return figures


def stop_if_refused(reply: httpx.Response) -> None:
    """End with the server's own words, which say what to change."""
    if reply.is_error:
        sys.exit(reply.json()["error"])


if __name__ == "__main__":
    main()
