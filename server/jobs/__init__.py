"""Training beside serving: jobs in folders, which run one at a time in their own process, and publish."""
