"""Hyper-parameters of δ-mem. Defaults are those of the released adapters, except the fp32 state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

from megatron_dla.errors import ConfigError


@dataclass(frozen=True)
class DeltaMemConfig:
    """One adapter: the same in every layer that carries it."""

    rank: int = 8
    """r: side of a state, 8..64."""
    num_states: int = 1
    """N: independent states a layer, each with its own q, k, v and gates (1..8)."""
    alpha: float = 16.0
    """The correction is scaled by alpha / rank (also with several states)."""
    write: Literal["token", "message"] = "token"
    """token: every token writes (TSW; with several states MSW). message: the mean of each chat message does (SSW)."""
    heads: tuple[str, ...] = ("q", "o")
    """Where the read steers: q = the query before its norm and RoPE, o = the output after its projection."""
    layers: tuple[int, ...] | None = None
    """Layers that carry a memory, counted from 0; None = every softmax attention layer."""
    rowwise_gates: bool = True
    """One gate per state row; False: one per state."""
    couple_lambda: bool = True
    """keep = 1 - beta; False: keep has a projection of its own."""
    update: Literal["standard", "lambda_outside", "no_lambda"] = "standard"
    """(keep, erase, write) = standard (l, b, b), lambda_outside (l, l b, b), no_lambda (1, b, b)."""
    beta_bias: float = -1.5
    """Write gate before training: sigmoid(-1.5) = 0.18, a half-life of 3.4 writes; -6 keeps 280."""
    lambda_bias: float = 1.5
    """Keep gate before training, uncoupled only."""
    output_init: Literal["base_slice_fixed", "base_slice", "zero", "random"] = "base_slice_fixed"
    """Start of the steering heads. zero: no correction at all before the first step."""
    output_gain: float = 0.05
    """Length of a copied column, or spread of random ones."""
    reference_width: int = 8
    """base_slice_fixed: columns of the base weight that are copied; the rest starts at zero."""
    memory: Literal["online", "static"] = "online"
    """static: the state is the identity and never written: a low-rank adapter of the same size, the control."""
    message_read: Literal["streaming", "pre_call"] = "streaming"
    """Writes by message. streaming: a message is read once the next token follows it, whatever the calls' cuts.
    pre_call: all tokens of a call read the state before it (the published code)."""
    message_fallback: Literal["error", "token"] = "error"
    """Writes by message without message ids. token: silently by token (the published code)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        self._in_range("rank", 8, 64)
        self._in_range("num_states", 1, 8)
        self._in_range("reference_width", 1, 512)
        for name, kind in get_type_hints(type(self)).items():
            choices = get_args(kind)
            if choices and all(isinstance(c, str) for c in choices) and getattr(self, name) not in choices:
                raise ConfigError(f"delta_mem.{name} = {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if not self.heads or set(self.heads) - {"q", "o"} or len(set(self.heads)) != len(self.heads):
            raise ConfigError(
                f"delta_mem.heads = {list(self.heads)}: use q, o or both (steering of keys and values is not supported)"
            )
        if self.update == "no_lambda" and not self.couple_lambda:
            raise ConfigError("delta_mem.update = 'no_lambda' has no keep gate: set delta_mem.couple_lambda to true")

    def _in_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"delta_mem.{name} = {value!r}: want a whole number from {low} to {high}")

    @property
    def width(self) -> int:
        """R = N r: length of a read."""
        return self.num_states * self.rank

    @property
    def gate_width(self) -> int:
        return self.width if self.rowwise_gates else self.num_states

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def carries(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has a memory, if it is a softmax layer."""
        return self.layers is None or layer in self.layers

    def count_parameters(self, hidden_size: int, query_size: int) -> int:
        """Trained parameters of one layer: 3 R d + gates + (H_q d_h) R + d R."""
        R, d, gates = self.width, hidden_size, self.gate_width * (hidden_size + 1)
        gates *= 1 if self.couple_lambda else 2
        return 3 * R * d + gates + query_size * R * ("q" in self.heads) + d * R * ("o" in self.heads)

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML have it: lists for tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeltaMemConfig:
        """Raises ConfigError on an unknown key."""
        known = get_type_hints(cls)
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"delta_mem.{unknown[0]}: unknown key; known are {', '.join(known)}")
        return cls(**values)
