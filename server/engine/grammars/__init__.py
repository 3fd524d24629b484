"""Grammars for generated text: compiled and walked in processes of their own."""
