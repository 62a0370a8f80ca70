"""Checkpoints: layout-free weights, DeepSpeed state, completeness marker, retention."""
