"""Hyper-parameters of δ-mem. Defaults are those of the released adapters, except the fp32 state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

from megatron_dla.errors import ConfigError

# files on disk keep the first release's names: keys of the config, and target modules
_STORED = {"target_modules": "heads", "layers_to_transform": "layers"}
_MODULES = {"q": "q_proj", "o": "o_proj"}
# not stored at their default: files and checksums of before they were stay what they are
_NEW = ("half_life", "max_output_ratio")


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
    target_modules: tuple[str, ...] = ("q_proj", "o_proj")
    """Projections whose output the read corrects: q_proj (before the query's norm and RoPE), o_proj."""
    layers_to_transform: tuple[int, ...] | None = None
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
    half_life: float = 0.0
    """Writes after which half of a state is left, before training, instead of beta_bias (uncoupled: lambda_bias).
    0: the bias as given."""
    output_init: Literal["base_slice_fixed", "base_slice", "zero", "random"] = "base_slice_fixed"
    """Start of the steering heads. zero: no correction at all before the first step."""
    output_gain: float = 0.05
    """Length of a copied column, or spread of random ones."""
    reference_width: int = 8
    """base_slice_fixed: columns of the base weight that are copied; the rest starts at zero."""
    max_output_ratio: float = 0.0
    """The correction of a token's attention output is at most this share of it, by length. 0: no bound."""
    memory: Literal["online", "static"] = "online"
    """static: the state is the identity and never written: a low-rank adapter of the same size, the control."""
    message_read: Literal["streaming", "pre_call"] = "streaming"
    """Writes by message. streaming: a message is read once the next token follows it, whatever the calls' cuts.
    pre_call: all tokens of a call read the state before it (the published code)."""
    message_fallback: Literal["error", "token"] = "error"
    """Writes by message without message ids. token: silently by token (the published code)."""

    def __post_init__(self) -> None:
        self._check_types()
        names = tuple(_MODULES.get(name, name) for name in self.target_modules)
        object.__setattr__(self, "target_modules", names)
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        self._in_range("rank", 8, 64)
        self._in_range("num_states", 1, 8)
        self._in_range("reference_width", 1, 512)
        for name, kind in get_type_hints(type(self)).items():
            choices = get_args(kind)
            if choices and all(isinstance(c, str) for c in choices) and getattr(self, name) not in choices:
                raise ConfigError(f"delta_mem.{name} = {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if not names or set(names) - set(_MODULES.values()) or len(set(names)) != len(names):
            raise ConfigError(
                f"delta_mem.target_modules = {list(names)}: use q_proj, o_proj or both (correcting keys and values is "
                "not supported)"
            )
        for name in _NEW:
            if getattr(self, name) < 0:
                raise ConfigError(f"delta_mem.{name} = {getattr(self, name)!r}: must be at least 0 (0: none)")
        if self.half_life and math.log(2) / self.half_life > 700:
            raise ConfigError(f"delta_mem.half_life = {self.half_life!r}: nothing would be left: use 0.01 or more")
        if self.update == "no_lambda" and not self.couple_lambda:
            raise ConfigError("delta_mem.update = 'no_lambda' has no keep gate: set delta_mem.couple_lambda to true")

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is bool and not isinstance(value, bool):
                raise ConfigError(f"delta_mem.{name} = {value!r}: must be true or false")
            if kind is float and (
                isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6
            ):
                raise ConfigError(f"delta_mem.{name} = {value!r}: must be a number between -1e6 and 1e6")
        for name, of in (("target_modules", str), ("layers_to_transform", int)):
            value = getattr(self, name)
            if name == "layers_to_transform" and value is None:
                continue
            if not isinstance(value, list | tuple) or not all(type(item) is of for item in value):
                raise ConfigError(f"delta_mem.{name} = {value!r}: must be a list of {of.__name__}")

    def _in_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"delta_mem.{name} = {value!r}: want an integer from {low} to {high}")

    @property
    def width(self) -> int:
        """R = N r: length of a read."""
        return self.num_states * self.rank

    @property
    def gate_biases(self) -> tuple[float, float]:
        """Of beta and lambda, before training: keep = 2^(-1 / half_life) has the logit -log(2^(1 / half_life) - 1)."""
        if not self.half_life:
            return self.beta_bias, self.lambda_bias
        lost = math.log(math.expm1(math.log(2) / self.half_life))
        return (lost, self.lambda_bias) if self.couple_lambda else (self.beta_bias, -lost)

    @property
    def gate_width(self) -> int:
        return self.width if self.rowwise_gates else self.num_states

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def carries(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has a memory, if it is a softmax layer."""
        return self.layers_to_transform is None or layer in self.layers_to_transform

    def count_parameters(self, hidden_size: int, query_size: int) -> int:
        """Trained parameters of one layer: 3 R d + gates + (H_q d_h) R + d R."""
        R, d, gates = self.width, hidden_size, self.gate_width * (hidden_size + 1)
        gates *= 1 if self.couple_lambda else 2
        q, o = "q_proj" in self.target_modules, "o_proj" in self.target_modules
        return 3 * R * d + gates + query_size * R * q + d * R * o

    def to_dict(self) -> dict[str, Any]:
        """As adapter files, checkpoints and sessions store it: lists for tuples, their key names."""
        short = {name: stored for stored, name in _MODULES.items()}
        values = asdict(self) | {"target_modules": [short[name] for name in self.target_modules]}
        values = {name: value for name, value in values.items() if name not in _NEW or value}
        return {
            _STORED.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeltaMemConfig:
        """From what `to_dict` gives. Raises ConfigError on an unknown key."""
        known = {_STORED.get(name, name): name for name in get_type_hints(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"delta_mem.{unknown[0]}: unknown key; known are {', '.join(known)}")
        return cls(**{known[key]: value for key, value in values.items()})
