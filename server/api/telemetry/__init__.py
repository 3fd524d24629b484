"""What is seen of the server from outside: request ids, one line in the log per request, metrics."""
