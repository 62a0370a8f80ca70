"""megatron-dla: pretraining with Dynamic Linear Attention on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
