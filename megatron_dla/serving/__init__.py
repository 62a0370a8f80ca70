"""Serving Hugging Face models with a δ-mem adapter: the wrapped model, sessions, generation and chat."""
