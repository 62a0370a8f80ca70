"""The small models that tests of exports and of fine-tuning are run on."""

from dataclasses import replace

from megatron_dla.config import ModelSection

BASE = ModelSection(
    hidden_size=32, num_layers=2, num_heads=4, num_groups=1, key_dim=8, value_dim=8, capacity=4, ffn_hidden_size=48,
    attention_heads=4, attention_groups=2, init_std=0.1, tau=1.35, vocab_multiple=128, rope_theta=10_000.0,
    sliding_window=7, levels=4,
)  # fmt: skip
SECTIONS = {
    "mamba2": BASE,
    "mamba2_hybrid": replace(BASE, num_groups=4, pattern="AD", conv_kernel=3, tau_mode="learned"),
    "mamba2_published": replace(BASE, num_groups=2, ffn_hidden_size=0, conv_bias=True, gated_norm="group"),
    "gdn": replace(BASE, backbone="gdn", num_groups=4, tie_embeddings=True),
    "gdn_hybrid": replace(BASE, backbone="gdn", num_groups=2, pattern="DA", tau_mode="learned"),
    "plain_gdn": replace(BASE, num_groups=2, pattern="GD"),  # beside DLA layers on the other backbone
    "shaped_attention": replace(
        BASE,
        num_layers=3,
        pattern="DAN",
        attention_head_dim=12,
        qk_norm=True,
        rope_type="llama3",
        rope_factor=8.0,
        rope_original_length=64,
    ),
}
RECURRENT = ["mamba2", "mamba2_hybrid", "mamba2_published", "gdn", "gdn_hybrid", "plain_gdn"]
CASES = [*RECURRENT, "shaped_attention"]
