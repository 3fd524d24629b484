"""Evaluate a task with EleutherAI's lm-evaluation-harness, on rows of your own.

    pip install "lm_eval[api]"
    python examples/evaluate_with_lm_eval.py --url http://127.0.0.1:8000 --task sms_spam
    python examples/evaluate_with_lm_eval.py --task sms_spam --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct

It writes two of the harness's tasks to a temporary folder: one lets the model write the label, the other asks which
label is the likelier. The harness cuts texts into tokens itself to tell a label from what comes before it, so the
second needs the model's tokenizer: a directory, or an id of the hub. Nothing else is loaded here; the model stays with
the server. `/v1/completions` puts no template around a text, so `--template` has to say what the task was trained with.

Rows are JSON lines of `{"input": …, "target": …}`, as `prelude train` and `prelude eval` take them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

ROWS = [
    {"input": "URGENT! You have won a 1 week FREE membership. Text WIN to 81010", "target": "spam"},
    {"input": "See you at seven, shall I bring wine?", "target": "ham"},
    {"input": "Final notice: your account is credited with 500 pounds, call 09061743386", "target": "spam"},
    {"input": "Sorry, I'll call later", "target": "ham"},
]


def write_tasks(folder: Path, rows: Path, labels: list[str], template: str) -> None:
    """The two tasks, as the harness reads them; JSON is YAML too."""
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": template,
        "doc_to_target": "{{target}}",
        "target_delimiter": "",  # the label comes right behind the template
    }
    written = {
        "task": "written",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match"}],
    }
    chosen = {
        "task": "chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": labels,
        "metric_list": [{"metric": "acc"}],
    }
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task), encoding="utf-8")


def evaluate(url: str, task: str, tokenizer: str | None, folder: Path) -> dict[str, Any]:
    """The metrics of each of the harness's tasks."""
    backend = {"tokenizer_backend": "None"} if tokenizer is None else {"tokenizer": tokenizer}
    results = simple_evaluate(
        "local-completions",
        model_args={"model": task, "base_url": f"{url}/v1/completions", "num_concurrent": 16, **backend},
        tasks=["written"] if tokenizer is None else ["written", "chosen"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert results is not None, "this is the only process"
    metrics: dict[str, Any] = results["results"]
    return metrics


def main() -> None:
    """Read the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--task", default="sms_spam", help="one of its tasks")
    parser.add_argument("--data", type=Path, help="rows; without it a few that this file brings")
    parser.add_argument("--template", default="{{input}}\n", help="what the model reads of a row")
    parser.add_argument("--tokenizer", help="the model's, for likelihoods")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = arguments.data
        if rows is None:
            rows = folder / "rows.jsonl"
            rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
        read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line]
        write_tasks(folder, rows, sorted({row["target"] for row in read}), arguments.template)
        for task, metrics in evaluate(arguments.url, arguments.task, arguments.tokenizer, folder).items():
            print(task, {name: float(value) for name, value in metrics.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
