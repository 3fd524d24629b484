"""From logits to tokens: each request's rules, draws, log-probabilities."""
