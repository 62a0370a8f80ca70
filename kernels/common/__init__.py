"""What the kernels of both operators share: launch utilities and tuned launch configurations."""
