"""Training: the loop, the DeepSpeed engine, schedule, validation, signals."""
