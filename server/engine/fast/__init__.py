"""Making a loaded model faster without changing what it computes."""
