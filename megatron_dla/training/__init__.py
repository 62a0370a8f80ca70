"""Training: the trainer and its interface to tasks, the DeepSpeed engine, schedule, validation, signals."""
