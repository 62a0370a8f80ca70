"""δ-mem (arXiv 2605.12357): an online r x r memory beside the attention layers of a frozen model.

`config` the hyper-parameters · `memory` parameters and mathematics of one layer, no Megatron · `messages` when a
message is written · `calls` inputs and results of a forward pass · `delta_mem` the hooks into Megatron's attention ·
`files` and `upstream` adapters as directories · `checkpoint` adapters in checkpoints.
"""
