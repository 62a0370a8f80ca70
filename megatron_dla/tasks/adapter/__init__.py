"""Training of a δ-mem adapter: episodes, their loader, checks, the task."""
