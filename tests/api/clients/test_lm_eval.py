"""EleutherAI's lm-evaluation-harness over /v1/completions: what it concludes is what the engine says.

It scores a continuation by having the whole text echoed with log-probabilities and one token more, cuts off the context
by counting tokens, and believes that a continuation is what greedy decoding gives if each token is the likeliest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.engine.model.frozen import FrozenModel
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.api.clients.support import Lazily, rendered
from tests.api.live import LiveServer, live_server
from tests.api.openai.support import FROZEN
from tests.support import make_engine, request, run_engine

if TYPE_CHECKING:
    from lm_eval import evaluator
    from lm_eval import tasks as harness_tasks
else:
    evaluator, harness_tasks = Lazily("lm_eval.evaluator"), Lazily("lm_eval.tasks")

ROWS = [
    {"text": "the film is 12 minutes long", "mood": "bad"},
    {"text": "a warm, funny delight", "mood": "good"},
    {"text": "", "mood": "good"},
]
MOODS = ["good", "bad", "in between"]
MOST_TOKENS = 8


@dataclass(frozen=True)
class Harness:
    """The harness with two tasks of its own on this machine, and a model to ask."""

    server: LiveServer
    model: FrozenModel
    tasks: Path
    tokenizer: Path

    def evaluate(self, task: str, model: str, *, kind: str = "local-completions", **options: Any) -> dict[str, Any]:
        """Its results on a task."""
        route = "/v1/chat/completions" if kind == "local-chat-completions" else "/v1/completions"
        arguments = {
            "model": model,
            "base_url": self.server.url + route,
            "tokenizer_backend": "huggingface",
            "tokenizer": str(self.tokenizer),
            "max_length": self.model.spec.max_model_len,
            "max_retries": 1,
            **options.pop("model_args", {}),
        }
        results = evaluator.simple_evaluate(
            kind,
            model_args=arguments,
            tasks=[task],
            task_manager=harness_tasks.TaskManager(include_path=str(self.tasks), include_defaults=False),
            bootstrap_iters=0,
            **options,
        )
        assert results is not None
        return dict(results)

    def written(self, context: str) -> tuple[str, str] | None:
        """A context with what the model writes behind it; None if its tokens are not plain characters."""
        reply = self.server.generate(context, max_new_tokens=3, details=True).json()
        tokens = reply["details"]["tokens"]
        is_plain = all(token["text"].isascii() and len(token["text"]) == 1 for token in tokens)
        return (context, reply["generated_text"]) if is_plain else None

    def scores(self, context: str, continuations: Sequence[str], soft_prompt: SoftPrompt | None) -> list[float]:
        """Log-probabilities of continuations as the engine scores labels: all at once, behind one prefill."""
        ids = self.model.text.encode(context)
        labels = [self.model.text.encode(context + text)[len(ids) :] for text in continuations]
        accepted = [request(f"r{i}", ids, labels=[label], max_new_tokens=1) for i, label in enumerate(labels)]
        outcomes = run_engine(make_engine(self.model), [(one, soft_prompt) for one in accepted])
        return [
            math.fsum(token.logprob for token in outcomes[one.request_id].scored if token.logprob is not None)
            for one in accepted
        ]


def write_tasks(folder: Path) -> None:
    """A task of each kind, and its rows; JSON is YAML too."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}\nMood:",
        "metadata": {"version": 1},
    }
    choose = {
        **common,
        "task": "mood_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": MOODS,
        "doc_to_target": "{{mood}}",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        **common,
        "task": "mood_written",
        "output_type": "generate_until",
        "doc_to_target": "{{mood}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": MOST_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")


@pytest.fixture(autouse=True)
def _describes_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result of the harness describes the machine, by commands that take a second of CPU time."""
    assert evaluator.simple_evaluate
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval") / "tasks"
    write_tasks(folder)
    return folder


@pytest.fixture
def harness(chats: LiveServer, tiny: FrozenModel, tasks: Path, tmp_path: Path) -> Harness:
    """With the tiny model, whose tokens are bytes."""
    tiny.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return Harness(chats, tiny, tasks, tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def real(served_smollm2: FrozenModel, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """With the embedded model, of whose tokens a word may be one, or several."""
    folder = tmp_path_factory.mktemp("real")
    served_smollm2.tokenizer.save_pretrained(folder / "tokenizer")
    with live_server(folder, model=served_smollm2) as live:
        yield Harness(live, served_smollm2, tasks, folder / "tokenizer")


def check_choices(harness: Harness, results: dict[str, Any], soft_prompt: SoftPrompt | None) -> None:
    """Every likelihood is the engine's, and the accuracy follows from them."""
    samples = sorted(results["samples"]["mood_chosen"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ROWS)
    right = 0
    for sample, row in zip(samples, ROWS, strict=True):
        told = [float(answer[0][0]) for answer in sample["resps"]]
        scores = harness.scores(f"{row['text']}\nMood:", [f" {mood}" for mood in MOODS], soft_prompt)
        assert told == pytest.approx(scores, abs=1e-3)
        assert all(score < 0 for score in scores)
        right += MOODS[scores.index(max(scores))] == row["mood"]
    assert results["results"]["mood_chosen"]["acc,none"] == pytest.approx(right / len(ROWS))


@pytest.mark.parametrize(("as_tokens", "together"), [(True, 1), (False, 4)], ids=["tokens-alone", "texts-together"])
def test_likelihoods_are_the_engines(harness: Harness, as_tokens: bool, together: int) -> None:
    task = f"lm-eval-{as_tokens}-{together}".lower()
    soft_prompt = harness.server.publish_random(task, 3)
    arguments = {"tokenized_requests": as_tokens, "num_concurrent": together}
    for model, behind in ((task, soft_prompt), (FROZEN, None)):
        check_choices(harness, harness.evaluate("mood_chosen", model, model_args=arguments), behind)


def test_several_texts_of_one_request_are_told_apart(harness: Harness) -> None:
    check_choices(harness, harness.evaluate("mood_chosen", FROZEN, batch_size=4), None)


def test_what_greedy_decoding_gives_is_known_as_such(harness: Harness, tmp_path: Path) -> None:
    """A continuation that the model itself wrote, and one that it did not."""
    contexts = (f"the film is {number}" for number in range(200))
    context, written = next(found for found in map(harness.written, contexts) if found is not None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": context, "one": written, "other": "zzzzzz"}), encoding="utf-8")
    task = {
        "task": "greedy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{[one, other]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "greedy.yaml").write_text(json.dumps(task), encoding="utf-8")
    own = Harness(harness.server, harness.model, tmp_path / "tasks", harness.tokenizer)
    [sample] = own.evaluate("greedy", FROZEN)["samples"]["greedy"]
    assert [str(answer[0][1]) for answer in sample["resps"]] == ["True", "False"]


@pytest.mark.parametrize("backend", ["huggingface", "None"])
def test_texts_are_the_servers(harness: Harness, backend: str) -> None:
    harness.server.publish_random("lm-eval-written", 4)
    stop = ["\n", "e"] if backend == "None" else ["\n", "e", "<eos>"]
    for model, task in (("lm-eval-written", "lm-eval-written"), (FROZEN, None)):
        results = harness.evaluate("mood_written", model, model_args={"tokenizer_backend": backend})
        samples = sorted(results["samples"]["mood_written"], key=lambda sample: sample["doc_id"])
        assert [sample["resps"][0][0] for sample in samples] == [
            harness.server.text(f"{row['text']}\nMood:", task, max_new_tokens=MOST_TOKENS, stop=stop) for row in ROWS
        ]


def test_texts_of_chats_are_the_servers(harness: Harness) -> None:
    results = harness.evaluate(
        "mood_written",
        FROZEN,
        kind="local-chat-completions",
        apply_chat_template=True,
        model_args={"tokenizer_backend": None, "tokenizer": None},
    )
    samples = sorted(results["samples"]["mood_written"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ROWS, strict=True):
        read = rendered(f"{row['text']}\nMood:")
        assert sample["resps"][0][0] == harness.server.text(read, max_new_tokens=MOST_TOKENS, stop=["\n", "e"])


@pytest.mark.parametrize("as_tokens", [True, False], ids=["tokens", "texts"])
def test_likelihoods_are_the_engines_with_a_real_tokenizer(real: Harness, as_tokens: bool) -> None:
    soft_prompt = real.server.publish_random("mood", 5)
    results = real.evaluate("mood_chosen", "mood", model_args={"tokenized_requests": as_tokens})
    check_choices(real, results, soft_prompt)
