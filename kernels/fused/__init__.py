"""Fused passes of a DLA mixer on a GPU: everything between its projections and its recurrence, and the gated norm.

Own kernels in place of fla's causal_conv1d, l2norm and gated norms, because

- fla 0.6.0 times tiles and warps in a run's first steps, and they decide the order of the sums over tokens: two runs
  would differ in the gradients of the weights;
- its convolution's backward pass writes the values before the SiLU to memory, and takes one section at a time;
- dt, g, beta and the slot weights come from the same tokens, and cost nothing more here.
"""
