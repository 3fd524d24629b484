"""Evaluations over HTTP: asked of the engine that serves, beside everybody else."""
