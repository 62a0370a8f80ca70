"""Ahead-of-time compilation: what each kernel needs on a GPU (`compile.py`), for every operator (`python -m`)."""
