"""From logits to tokens: rules of each request, draws, log-probabilities."""
