"""`dla ablate`: recipes of one adapter, what their memory gives and what it costs."""
