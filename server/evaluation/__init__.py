"""How good a task's answers are: asked through the served path, against baselines, with intervals."""
