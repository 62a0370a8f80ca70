"""A real Slurm cluster in namespaces of this machine, and what the tests start on it."""
