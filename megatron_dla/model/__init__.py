"""The language model: layer specs, initialisation, counts."""
