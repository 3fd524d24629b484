"""Tiny models of every family of causal language models in transformers, and how the server treats them.

`python -m tests.engine.families NAME …` prints what becomes of some families; without names all are judged, and the
table in docs/models.md is renewed. Each family has a process of its own, within bounds of memory and time.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from server.engine.attention.interface import PackedRows
from server.engine.model.compatibility import refuse_unsupported
from server.engine.model.exactness import errors, own_logits, refuse_inexact
from server.engine.model.frozen import FrozenModel
from server.engine.model.load_errors import as_sentence, refusing_own_choice
from server.errors import ConfigurationError, UnsupportedModel
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.engine.tiny_families import EXAMPLES, tiny_config, tiny_family
from tests.support import RecordingModel, byte_tokenizer, make_engine, random_soft_prompt, request

TEXT = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
FAMILIES = sorted(TEXT | set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARK = "<!-- by tests/engine/families.py -->"

TOO_MUCH = "No memory or time."

LARGEST_ERROR = 1e-5
MAX_BYTES, MAX_SECONDS = 3 * 2**30, 60


@dataclass(frozen=True)
class Verdict:
    """How the server treats a family.

    Attributes:
        family: transformers' `model_type`.
        status: `right`, `refused`, `not built`, or `wrong`, which must never be.
        reason: the refusal's sentence, why no tiny model can be built, or what is wrong.
    """

    family: str
    status: str
    reason: str = ""


def judge(family: str) -> Verdict:
    """Build a tiny model of a family, and see whether the server refuses it or answers as the model itself."""
    try:
        refuse_unsupported(AutoConfig.for_model(family))
        refuse_unsupported(tiny_config(family))
    except UnsupportedModel as refusal:
        return Verdict(family, "refused", _sentence(refusal))
    except Exception as error:  # noqa: BLE001 - transformers raises anything
        return Verdict(family, "not built", _of(error))
    try:
        with torch.inference_mode():
            tiny_family(family, "eager")(input_ids=torch.arange(3, 9)[None], use_cache=False)
    except Exception as error:  # noqa: BLE001
        return Verdict(family, "not built", _of(error))
    try:
        with as_sentence(f"{family} cannot be used"), refusing_own_choice(family):
            model = FrozenModel(tiny_family(family), byte_tokenizer(), name=family, max_model_len=128)
            refuse_inexact(model)
    except ConfigurationError as refusal:
        return Verdict(family, "refused", _sentence(refusal))
    worst = max(_packed_error(model), *_engine_errors(model))
    return Verdict(
        family, "right" if worst <= LARGEST_ERROR else "wrong", "" if worst <= LARGEST_ERROR else f"{worst:.1e}"
    )


@torch.inference_mode()
def _packed_error(model: FrozenModel) -> float:
    """The largest error of two packed rows, as in training, that are longer than the model's windows."""
    ids = torch.arange(5, 35) * 7 % 250
    n = len(ids)
    own = own_logits(model.module, input_ids=ids)
    rows, positions = model.embed(ids.repeat(2)), torch.arange(n).repeat(2)
    packed = model.forward(rows, positions, PackedRows([n, n]), torch.arange(2 * n))
    return float(errors(packed, torch.cat([own, own])).max())


@torch.inference_mode()
def _engine_errors(model: FrozenModel) -> Iterator[float]:
    """The largest error of what the engine generates in one batch with each kind of soft prompt, and with none."""
    by_embeddings = random_soft_prompt(model.spec, 5)
    virtual_tokens = by_embeddings.tensor * model.embed(torch.arange(250)).std()
    by_embeddings = SoftPrompt("PROMPT_TUNING", virtual_tokens)
    recording = RecordingModel(model)
    engine = make_engine(recording)
    work: dict[str, tuple[list[int], SoftPrompt | None, torch.Tensor]] = {
        "none": (list(range(40, 61)), None, virtual_tokens[:0]),
        "embeddings": ([7, 90, 14, 8, 3, 200], by_embeddings, virtual_tokens),
    }
    if not model.spec.state_width:  # keys and values do not say what a recurrent state would be
        by_kv = SoftPrompt("PREFIX_TUNING", _keys_and_values(model, virtual_tokens))
        work["kv"] = (list(range(100, 120)), by_kv, virtual_tokens)
    tokens: dict[str, list[int]] = {name: [] for name in work}
    for name, (input_ids, soft_prompt, _) in work.items():
        engine.add(request(name, input_ids, max_new_tokens=4, ignore_eos=True), soft_prompt)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in work}
    while engine.has_work:
        for delta, logits in zip(engine.step(), recording.last_logits, strict=True):
            assert delta.token is not None
            rows[delta.request_id].append(logits)
            tokens[delta.request_id].append(delta.token.id)
    for name, (input_ids, _, virtual) in work.items():
        inputs = torch.cat([virtual, model.embed(torch.tensor(input_ids + tokens[name][:-1]))])
        own = own_logits(model.module, inputs_embeds=inputs)[-len(tokens[name]) :]
        yield float(errors(torch.stack(rows[name]), own).max())


def _keys_and_values(model: FrozenModel, virtual_tokens: torch.Tensor) -> torch.Tensor:
    """Keys and values of virtual tokens as PEFT stores them: `[n, layers * 2 * kv_heads * head_dim]`."""
    collected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    n = len(virtual_tokens)
    model.forward(virtual_tokens, torch.arange(n), PackedRows([n], collected=collected), torch.arange(n))
    states = torch.stack(
        [torch.stack(collected[layer]) for layer in sorted(collected)]
    )  # [layers, 2, kv_heads, n, head_dim]
    return states.permute(3, 0, 1, 2, 4).reshape(n, -1)


def _sentence(refusal: ConfigurationError) -> str:
    """A refusal without the figures, which depend on the machine."""
    return refusal.message.split(": its logits")[0].rstrip(".").replace("|", "/") + "."


def _of(error: Exception) -> str:
    if "-v" in sys.argv:
        traceback.print_exception(error)
    if "can't allocate memory" in str(error):
        return TOO_MUCH
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _judge_apart(family: str, results: Any) -> None:
    """Judge in this process, which is a family's own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    torch.set_num_threads(1)
    try:
        verdict = judge(family)
    except Exception as error:  # noqa: BLE001 - it is a finding, whatever it is
        verdict = Verdict(family, "wrong", _of(error))
    results.put(verdict)


def judge_all(families: Iterable[str]) -> Iterator[Verdict]:
    """Verdicts of families, each judged in a process of its own that is killed when it takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.families"])
    for family in families:
        results = context.SimpleQueue()
        process = context.Process(target=_judge_apart, args=(family, results), daemon=True)
        process.start()
        process.join(MAX_SECONDS)
        process.kill()
        process.join()
        yield Verdict(family, "not built", TOO_MUCH) if results.empty() else results.get()


def row(verdict: Verdict) -> str:
    """A family's line of the table in docs/models.md."""
    examples = EXAMPLES.get(verdict.family, "")
    served = {"right": "yes", "refused": "no"}.get(verdict.status, verdict.status)
    return f"| `{verdict.family}` | {examples} | {served} | {verdict.reason} |"


def table(verdicts: Iterable[Verdict]) -> str:
    """The table in docs/models.md, with a line that counts."""
    found = list(verdicts)
    counts = ", ".join(
        f"{sum(v.status == status for v in found)} {status}" for status in ("right", "refused", "not built")
    )
    head = ["| `model_type` | for example | served | why not |", "|---|---|---|---|"]
    return "\n".join(
        [f"{len(found)} families of transformers {transformers.__version__}: {counts}.", "", *head, *map(row, found)]
    )


def written_table() -> str:
    """The table as docs/models.md has it."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[1].strip()


def _main(names: list[str]) -> None:
    verdicts = []
    for verdict in tqdm(judge_all(names or FAMILIES), total=len(names or FAMILIES), disable=bool(names)):
        verdicts.append(verdict)
        if names or verdict.status == "wrong":
            print(row(verdict), flush=True)  # noqa: T201
    if not names:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n{table(verdicts)}\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    _main([name for name in sys.argv[1:] if not name.startswith("-")])
