"""From a JSONL file to a soft prompt, on the same frozen model and the same forward that serve it."""
