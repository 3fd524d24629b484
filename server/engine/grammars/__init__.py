"""Grammars for generated text, which are compiled and walked in separate processes."""
