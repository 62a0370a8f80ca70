"""`dla bench kernels`: speed and memory of the DLA kernels beside their alternatives, measured in one run.

Needs only torch; Triton (the fast kernels), fla (its baselines) and matplotlib (the plot) are used where they are.
"""
