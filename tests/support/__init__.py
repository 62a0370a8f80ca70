"""What several tests share: cases, models, workers of gloo ranks, the Triton interpreter, a Slurm cluster."""
