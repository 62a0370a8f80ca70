"""Faults injected into whole training runs."""
