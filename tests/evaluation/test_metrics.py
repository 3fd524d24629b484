"""Figures against values computed by hand, and by the packages that define them."""

from __future__ import annotations

import math
import random
import sys

import pytest
from sacrebleu.metrics import bleu as sacre

from server.errors import ConfigurationError
from server.evaluation import metrics
from server.evaluation.metrics import EXACT_MATCH, GENERATED_ACCURACY, accuracy, bleu, macro_f1, perplexity, rouge_l
from server.evaluation.questions import is_same
from server.evaluation.systems import System
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.evaluation.support import data_of, texts
from tests.train.rows import MOODS

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", ",", ".")
ALONE = System("zero-shot")


def test_accuracy_is_the_share_of_labels_that_were_found() -> None:
    assert accuracy([0, 1, 1, 0], [0, 1, 0, None]).value == 0.5
    assert accuracy([None], [None]).value == 0.0, "no label is not a label that was found"


def test_macro_f1_is_the_mean_over_labels_whatever_their_size() -> None:
    # Label 0: 2 right of 3 rows and 3 answers, F1 2/3. Label 1: 1 right of 2 rows and 1 answer, F1 2/3.
    assert macro_f1([0, 0, 0, 1, 1], [0, 0, None, 0, 1], 2).value == pytest.approx(2 / 3)
    # Label 0: F1 1; label 1: never found, F1 0; label 2: no row's and no answer, so not in the mean.
    assert macro_f1([0, 0, 1], [0, 0, None], 3).value == pytest.approx(0.5)
    # An answer for a label that is no row's is in the mean, with F1 0.
    assert macro_f1([0, 0], [0, 2], 3).value == pytest.approx((2 * 1 / 3 + 0) / 2)


def test_perplexity_is_of_all_tokens_and_not_a_mean_of_rows() -> None:
    assert perplexity([2.0, 1.0], [3, 1]).value == pytest.approx(math.exp(3.0 / 4))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_best_over_references() -> None:
    # "the cat sat" and "the cat sat down here": 3 in common, precision 1, recall 3/5.
    assert rouge_l(["the cat sat"], [["the cat sat down here"]]).value == pytest.approx(0.75)
    assert rouge_l(["the cat sat"], [["nothing", "the cat sat", "cat"]]).value == 1.0
    assert rouge_l(["cats running"], [["cat runs"]]).value == 1.0, "words are stemmed"
    assert rouge_l([""], [["cat"]]).value == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_bleu_is_sacrebleu_s_for_the_corpus_with_any_number_of_references(seed: int) -> None:
    dice = random.Random(seed)

    def text(shortest: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(shortest, 9)))

    written = [text(0) for _ in range(dice.randint(1, 12))]
    references = [[text(1) for _ in range(dice.randint(1, 4))] for _ in written]
    most = max(map(len, references))
    streams = [[several[i] if i < len(several) else None for several in references] for i in range(most)]
    expected = sacre.BLEU().corpus_score(written, streams).score  # type: ignore[arg-type]
    assert bleu(written, references).value == pytest.approx(expected)


def test_bleu_of_hand_counted_texts() -> None:
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]).value == pytest.approx(100.0)
    assert bleu(["x"], [["y"]]).value == 0.0
    assert bleu([""], [["y"]]).value == 0.0
    # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 longer ones, no brevity penalty.
    value = bleu(["the cat sat on mats"], [["the cat sat on it"]]).value
    assert value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_a_soft_prompt_must_match_exactly_and_the_frozen_model_alone_need_not() -> None:
    data, rows = data_of(MOODS), texts("Yes.", "yes\nas I said", "**No**", " no ")
    trained = System("mood", soft_prompt=_any_soft_prompt())
    assert metrics.written(rows, trained, data)[EXACT_MATCH].value == 0.25
    assert metrics.written(rows, ALONE, data)[EXACT_MATCH].value == 1.0
    assert metrics.classification(rows, trained, data, ["no", "yes"])[GENERATED_ACCURACY].value == 0.25
    assert metrics.classification(rows, ALONE, data, ["no", "yes"])[GENERATED_ACCURACY].value == 1.0


def test_an_answer_matches_exactly_if_it_is_any_of_the_references() -> None:
    data = data_of([("a", "one"), ("b", "two")], [["one", "uno"], ["two", "due"]])
    assert metrics.written(texts("uno", "tre"), ALONE, data)[EXACT_MATCH].value == 0.5


def test_answers_of_several_lines_are_taken_whole_where_targets_have_several() -> None:
    data = data_of([("a", "one\ntwo")])
    assert metrics.written(texts("one\ntwo"), ALONE, data)[EXACT_MATCH].value == 1.0


@pytest.mark.parametrize(
    ("text", "target", "counts"),
    [
        ("spam", "spam", True),
        ("Spam.", "spam", True),
        (" **Spam!** ", "spam", True),
        ('"ham"', "Ham", True),
        ("yes", "Yes.", True),
        ("It is spam", "spam", False),
        ("cardarrival", "card_arrival", False),
        ("", "spam", False),
        ("...", "spam", False),
        ("...", "!", False),
        ("!", "!", True),
    ],
)
def test_leniency_forgives_case_and_what_stands_around_and_nothing_else(text: str, target: str, counts: bool) -> None:
    assert is_same(text, target, lenient=True) is counts


@pytest.mark.parametrize(("module", "named"), [("rouge_score.rouge_scorer", "rouge-score"), ("sacrebleu", "sacrebleu")])
def test_a_package_that_is_missing_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, module: str, named: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None if module == "sacrebleu" else sys.modules["sacrebleu"])
    with pytest.raises(ConfigurationError, match=rf"{named}.*pip install \"prelude-server\[train\]\""):
        metrics.check_installed()


def _any_soft_prompt() -> SoftPrompt:
    import torch

    return SoftPrompt("PROMPT_TUNING", torch.zeros(1, 1))
