"""Which of a run's measured states is kept."""

import pytest

from server.train.run_history import Measured, TeacherForcedScore, best_of


def history(*scores: tuple[float, float]) -> list[Measured]:
    return [
        Measured(step, 0.0, TeacherForcedScore(loss, exact_match)) for step, (exact_match, loss) in enumerate(scores, 1)
    ]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        pytest.param([(0.5, 0.3), (0.8, 0.4), (0.7, 0.1)], 1, id="exact match before loss"),
        pytest.param([(0.8, 0.4), (0.8, 0.3)], 1, id="loss between equals"),
        pytest.param([(0.8, 0.3), (0.8, 0.3)], 0, id="the earliest of equals"),
        pytest.param([(0.02, 1.9), (0.01, 1.2), (0.0, 1.3)], 1, id="loss where texts are hardly ever met"),
        pytest.param([(0.0, 0.9), (0.05, 0.5), (0.1, 0.7)], 2, id="exact match once it tells"),
    ],
)
def test_exact_match_decides_where_it_is_more_than_chance(scores: list[tuple[float, float]], best: int) -> None:
    assert best_of(history(*scores)) == best
