"""The language model: Megatron-Core's GPTModel over our layer specs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_dla import compat
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.config import LETTERS, ModelSection, ParallelSection, attention_head_dim, layer_letters


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """The vocabulary rounded up, so that it divides over the ranks."""
    return -(-vocab_size // multiple) * multiple


def transformer_config(
    section: ModelSection, parallel: ParallelSection, dtype: torch.dtype, on_cpu: bool, recompute: str = "none"
):
    """Megatron's TransformerConfig. Its fusions are off, as they need Transformer Engine or Apex, but for SwiGLU on a
    GPU, which `torch.compile` makes one kernel each way."""
    compat.install()
    from megatron.core.transformer.transformer_config import TransformerConfig

    mixers = [LETTERS[letter] for letter in layer_letters(section)]
    unrotated = [int(mixer.softmax and not mixer.rotary) for mixer in mixers]
    return TransformerConfig(
        num_layers=section.num_layers,
        hidden_size=section.hidden_size,
        num_attention_heads=section.attention_heads,
        num_query_groups=section.attention_groups,
        kv_channels=attention_head_dim(section),
        no_rope_freq=unrotated if any(unrotated) else None,
        ffn_hidden_size=section.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        normalization="RMSNorm",
        layernorm_epsilon=section.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=not on_cpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def build_model(
    section: ModelSection,
    parallel: ParallelSection,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "auto",
    recompute: str = "none",
    keep_states: bool = False,
    delta_mem: DeltaMemConfig | None = None,
):
    """A GPTModel with DLA layers, tagged and initialised; Megatron's groups must exist.

    `forward(input_ids [B, S], position_ids, attention_mask, labels=...)` gives the loss of each token [B, S], or
    logits [B, S, vocab / TP] without labels; under context parallelism S is this rank's part of the row.
    `vocab_size` is the tokenizer's; the model pads it. `seq_len` counts whole rows. Without a `seed` the weights are
    left as allocated, for a caller that fills them. `recompute`, `keep_states`: as in the config. `delta_mem` puts a
    memory beside softmax layers; without a seed the caller initialises it too
    (`adapters.delta_mem.initialise_memories`), after the weights.
    """
    config = transformer_config(section, parallel, dtype, device == "cpu", recompute)
    from megatron_dla.mixers.dla import DLAMixer
    from megatron_dla.mixers.rotary import rotary_frequencies
    from megatron_dla.mixers.softmax import ContiguousRotary
    from megatron_dla.model.init import initialise, tag_megatron_parameters
    from megatron_dla.model.language_model import LanguageModel
    from megatron_dla.model.parameters import model_parameters
    from megatron_dla.model.spec import block_spec
    from megatron_dla.parallel.groups import process_groups

    groups, vocabulary = process_groups(), padded_vocab(vocab_size, section.vocab_multiple)
    rotary_layers = any(LETTERS[letter].rotary for letter in layer_letters(section))
    block = block_spec(section, backend, parallel.cp_scheme)
    if delta_mem is not None:
        from megatron_dla.adapters.delta_mem import add_memories, initialise_memories

        add_memories(block, delta_mem)
    model = LanguageModel(
        config,
        block,
        vocab_size=vocabulary,
        max_sequence_length=seq_len,
        position_embedding_type="rope" if rotary_layers else "none",
        share_embeddings_and_output_weights=section.tie_embeddings,
        pg_collection=groups,
        backend=backend,
    )
    if rotary_layers:
        m, rotary = section, model.rotary_pos_emb
        frequencies = rotary_frequencies(
            attention_head_dim(m), m.rope_theta, m.rope_type, m.rope_factor, m.rope_low_freq_factor,
            m.rope_high_freq_factor, m.rope_original_length,
        )  # fmt: skip
        rotary.inv_freq = frequencies.to(rotary.inv_freq.device)  # Megatron's own knows one llama3 length only
        if groups.cp.size() > 1:
            model.rotary_pos_emb = ContiguousRotary(rotary, groups.cp)
    for module in model.modules():
        if isinstance(module, DLAMixer):
            module.keep_states = keep_states
    tag_megatron_parameters(model, model_parameters(section, vocabulary, groups.tp.size()))
    if seed is not None:
        initialise(model, seed, groups.tp.rank(), groups.tp.size())
        if delta_mem is not None:
            initialise_memories(model, seed)
    return model


def packed_sequence(cu_seqlens: torch.Tensor | None, seq_len: int):
    """Megatron's PackedSeqParams for rows of packed documents (sbhd), or None.

    `cu_seqlens`: int32 [n + 1] over the flattened B * S tokens of whole rows (at every context-parallel size), every
    row start included; on the host, where every layer reads it without waiting for the device.
    """
    if cu_seqlens is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=seq_len,
        max_seqlen_kv=seq_len,
    )


def slot_mixers(model: torch.nn.Module) -> list:
    """The mixers that open slots, in layer order."""
    from megatron_dla.mixers.dla import DLAMixer

    return [module for module in model.modules() if isinstance(module, DLAMixer) and module.reports_boundaries]
