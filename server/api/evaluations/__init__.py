"""Evaluations over HTTP, on the serving engine, beside live requests."""
