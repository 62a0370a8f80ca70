"""What a training step launches, moves and computes, counted without a GPU, and the time that is predicted for it."""
