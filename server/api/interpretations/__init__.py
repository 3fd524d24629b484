"""Experiments with a soft prompt over HTTP; they run on the serving engine, beside live requests."""
