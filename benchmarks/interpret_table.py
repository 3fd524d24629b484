"""What the included soft prompts mean, one row each; and their cards.

Measures that need no data are computed. Experiments take up to half an hour per soft prompt, so `prelude inspect`
writes their results to a folder first:

    PRELUDE_DTYPE=float32 prelude inspect emotion --data emotion/test.jsonl --limit 64 --json results/emotion.json
    PRELUDE_DTYPE=float32 python benchmarks/interpret_table.py --experiments results
    PRELUDE_DTYPE=float32 python benchmarks/interpret_table.py --experiments results --cards

`--cards` also replaces the section "What it means" in the cards, and their pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from server.durable import replace_file
from server.engine.build_engine import load_engine
from server.interpret.null_cache import NullCache
from server.interpret.pictures import draw
from server.interpret.results import CausalInterpretation, Interpretation, Similarity
from server.interpret.section import PICTURES, card_section
from server.interpret.static import Interpreter
from server.interpret.verdict import written_p
from server.settings import Settings
from server.soft_prompts.formats import load_soft_prompts

ROOT = Path(__file__).parents[1]
HEAD = (
    "soft prompt", "nearest to the start", "change near a word, p", "labels, z and p", "raised tokens", "rows",
    "R: random tokens", "start", "words, or values alone", "8 bits", "needed", "nearest by function",
)  # fmt: skip
NONE = "–"


def included() -> list[Path]:
    """Directories of the included soft prompts."""
    return [*sorted(path.parent for path in ROOT.glob("prompts/*/manifest.json")), ROOT / "examples/sentiment"]


def experiments(folder: Path | None, task: str) -> CausalInterpretation | None:
    """Results that `prelude inspect --json` wrote."""
    path = None if folder is None else folder / f"{task}.json"
    if path is None or not path.is_file():
        return None
    found = CausalInterpretation.model_validate(json.loads(path.read_text(encoding="utf-8"))["causal"])
    file = Path(found.data)
    return found.model_copy(update={"task": task, "data": f"{file.parent.name}/{file.name}"})


def row(static: Interpretation, causal: CausalInterpretation | None, similarity: Similarity) -> list[str]:
    """The figures of one soft prompt."""
    nearest, lens = static.nearest, static.lens
    cells = [f"`{static.task}`", NONE, NONE, NONE, NONE]
    if nearest is not None:
        cells[1:3] = f"{nearest.num_at_start} of {len(nearest.tokens)}", written_p(nearest.p_change)
    if lens is not None:
        cells[4] = ", ".join(f"`{token.text}`" for token in lens.tokens) or "none"
        if lens.labels is not None:
            cells[3] = f"{lens.labels.z:.2f}, {written_p(lens.labels.p)}"
    cells += [f"{causal.rows}" if causal else NONE, *ratios(causal)]
    needed = NONE
    if causal is not None and causal.necessity is not None:
        needed = f"{len(causal.necessity.needed)} of {len(causal.necessity.tokens)}"
    pairs = [pair for pair in similarity.pairs if static.task in (pair.one, pair.other)]
    best = max(pairs, key=lambda pair: pair.function or 0.0)
    other = best.other if best.one == static.task else best.one
    return [*cells, needed, f"`{other}` {best.function:.2f}"]


def ratios(causal: CausalInterpretation | None) -> list[str]:
    """R of some variants, with their intervals."""
    found = {step.name: step.ratio for step in causal.sufficiency.steps} if causal and causal.sufficiency else {}
    words = next((name for name in ("nearest tokens", "learned values, keys of the start") if name in found), "")
    picked = [found.get(name) for name in ("random tokens", "start", words, "8 bits")]
    return [NONE if one is None else f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" for one in picked]


def write_card(directory: Path, static: Interpretation, causal: CausalInterpretation | None) -> None:
    """Replace the section of a card, if it has one, and draw its pictures."""
    path = directory / "README.md"
    before, mark, rest = path.read_text(encoding="utf-8").partition("## What it means\n")
    if not mark:
        return
    drawn = {one.stem: one for one in draw(directory, static=static, causal=causal)}
    for name in drawn.keys() - PICTURES.keys():
        drawn[name].unlink()
    section = card_section(static, causal, drawn.keys() & PICTURES.keys())
    replace_file(path, f"{before}{section}\n\n## {rest.partition(chr(10) + '## ')[2]}".encode())


def main() -> None:
    """Measure, print the table, and write cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=Path, help="folder with TASK.json from prelude inspect --json")
    parser.add_argument("--cards", action="store_true", help="also rewrite the cards")
    options = parser.parse_args()
    settings = Settings.load()
    interpreter = Interpreter(load_engine(settings).model, NullCache(settings.cache_dir / "interpretation"))
    most = settings.max_virtual_tokens
    loaded = {path: load_soft_prompts(path, interpreter.model.spec, most)[0] for path in included()}
    similarity = interpreter.compare([(path.name, soft_prompt) for path, soft_prompt in loaded.items()])
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD))))
    for directory, soft_prompt in loaded.items():
        static = interpreter.interpret(directory.name, soft_prompt, list(loaded.values()))
        causal = experiments(options.experiments, directory.name)
        print(f"| {' | '.join(row(static, causal, similarity))} |")
        if options.cards:
            write_card(directory, static, causal)


if __name__ == "__main__":
    main()
