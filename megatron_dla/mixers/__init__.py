"""Sequence mixers as Megatron-Core modules: the DLA layer (both backbones), short convolution, norms, softmax core."""
