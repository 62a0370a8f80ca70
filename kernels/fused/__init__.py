"""Fused passes on a GPU: between a mixer's projections and its recurrence, its gated norm, and the loss.

Own kernels in place of fla's causal_conv1d, l2norm, gated norms and losses, because

- fla 0.6.0 times tiles and warps in a run's first steps, and they decide the order of the sums over tokens: two runs
  would differ in the gradients of the weights;
- its convolution takes one section at a time, and dt, g, beta and the slot weights need passes of their own;
- its fused linear cross entropy knows no vocabulary that is split over ranks.
"""
