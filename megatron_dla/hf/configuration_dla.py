"""Configuration of a Dynamic Linear Attention language model (copied into every exported directory)."""

from __future__ import annotations

import transformers
from transformers import PretrainedConfig

from .pattern import LETTERS, describe_letters
from .releases import check_release

check_release(transformers.__version__)


class DLAConfig(PretrainedConfig):
    """Sizes and rules of a decoder of (mixer + SwiGLU) layers, or of mixers alone (`ffn_hidden_size` 0).

    Names are those of the training config's model section, except: `layer_letters` holds one letter a layer (see
    `pattern.LETTERS`), `vocab_size` counts the padded rows of the embedding, `tokenizer_size` the tokens that they were
    trained with (0: not known), and `training_length` the tokens of a training row. `max_position_embeddings` is no
    limit of the model, which has none, but of clients that want one.

    Raises:
        ValueError: sizes that contradict each other; the message names them.
    """

    model_type = "dla"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "attention_heads",
        "num_key_value_heads": "attention_groups",
    }

    vocab_size: int = 32000
    hidden_size: int = 1536
    num_layers: int = 21
    layer_letters: str = ""
    backbone: str = "mamba2"
    num_heads: int = 48
    num_groups: int = 1
    key_dim: int = 128
    value_dim: int = 64
    conv_kernel: int = 4
    conv_bias: bool = False
    gated_norm: str = "head"
    capacity: int = 30
    tau: float = 0.6
    tau_mode: str = "fixed"
    boundary: str = "information"
    boundary_rate: float = 0.03125
    boundary_every: int = 32
    merge: str = "density"
    control_seed: int = 0
    levels: int = 15
    slot_weights: str = "recency"
    slot_weight_init: str = "backbone"
    ffn_hidden_size: int = 4096
    attention_heads: int = 16
    attention_groups: int = 16
    attention_head_dim: int = 0
    sliding_window: int = 512
    qk_norm: bool = False
    rope_theta: float = 500_000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    norm_eps: float = 1e-5
    init_std: float = 0.006
    dt_min: float = 0.001
    dt_max: float = 0.1
    a_min: float = 1.0
    a_max: float = 16.0
    vocab_multiple: int = 128
    training_length: int = 0
    max_position_embeddings: int = 1 << 20
    tokenizer_sha256: str = ""
    tokenizer_size: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs) -> None:
        self.layer_letters = self.layer_letters or "D" * self.num_layers
        if len(self.layer_letters) != self.num_layers or set(self.layer_letters) - LETTERS.keys():
            wanted = f"{self.num_layers} letters, each one of {describe_letters()}"
            raise ValueError(f"layer_letters = {self.layer_letters!r}: give {wanted}")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type = {self.rope_type!r}: use default, linear or llama3")
        if self.backbone not in ("mamba2", "gdn"):
            raise ValueError(f"backbone = {self.backbone!r}: use mamba2 or gdn")
        if self.gated_norm not in ("head", "group"):
            raise ValueError(f"gated_norm = {self.gated_norm!r}: use head or group")
        if self.slot_weights not in ("recency", "content"):
            raise ValueError(f"slot_weights = {self.slot_weights!r}: use recency or content")
        if self.sliding_window < 1:
            raise ValueError(f"sliding_window = {self.sliding_window}: use at least 1")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_groups = {self.num_groups} does not divide num_heads = {self.num_heads}")
        super().__post_init__(**kwargs)

    @property
    def attention_channels(self) -> int:
        """Channels of one softmax head."""
        return self.attention_head_dim or self.hidden_size // self.attention_heads


__all__ = ["DLAConfig"]
