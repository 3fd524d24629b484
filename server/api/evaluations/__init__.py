"""Evaluations over HTTP; they run on the serving engine, beside live requests."""
