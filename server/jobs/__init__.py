"""Training beside serving: jobs that lie in folders, run one at a time in a process of their own, and publish."""
