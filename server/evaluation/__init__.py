"""How good a task's answers are: from the serving engine, against baselines, with intervals."""
