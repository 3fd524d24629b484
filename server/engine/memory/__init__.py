"""Memory of sequences and prefixes: the KV cache, what is kept in it, and the plan of its size."""
