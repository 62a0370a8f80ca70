"""`dla study`: arms x learning rates x seeds of one config on the same data, and their comparison."""
