"""Reads tokenised WebDataset shards: verified, deterministic, packed into rows, resumable at any data-parallel size."""

from megatron_dla.data.loader import TokenLoader
from megatron_dla.data.packing import Batch, Row, make_batch, pack_row
from megatron_dla.data.shards import ShardReader
from megatron_dla.data.stream import TokenStream
from megatron_dla.data.validation import validation_batches

__all__ = ["Batch", "Row", "ShardReader", "TokenLoader", "TokenStream", "make_batch", "pack_row", "validation_batches"]
