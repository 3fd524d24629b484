"""What is measured and checked, a module for each stage; each has `measure(run)` and imports only what it needs."""
