"""Which soft prompt is live under which name, durably."""
