"""What the kernels share: ahead-of-time compilation and its resource report (`aot.py`)."""
