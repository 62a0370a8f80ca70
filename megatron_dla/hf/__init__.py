"""Hugging Face: the model in plain torch, conversion both ways, verification and generation."""
