"""δ-mem of one attention layer: parameters, the read-then-write scan, the two corrections. No Megatron here.

With x_t the input of the attention (after the layer norm), s = alpha / r, and per state (arXiv 2605.12357, eq. 4-12):

    q_t, k_t = l2norm(tanh(W x_t))    v_t = W_v x_t    beta_t = sigmoid(W_b x_t + b)
    read_t = S_{t-1} q_t              S_t = (1 - beta_t) S_{t-1} + beta_t (v_t - S_{t-1} k_t) k_t^T      (gates by row)
    query_t += s W_q^D read_t         output_t += s W_o^D read_t
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.messages import Pending, find_runs, message_writes
from megatron_dla.kernels.delta_mem import delta_mem_scan
from megatron_dla.mixers.layout import named_generator

L2_EPS = 1e-6
TINY = 1e-12


@dataclass
class MemoryInputs:
    """Flags of one call's tokens, the same for all layers. bool / int64 [B, T]; None: see each."""

    valid: Tensor | None = None
    """False: padding, which reads zero and writes nothing."""
    reset: Tensor | None = None
    """True: the state is zeroed before this token (start of an episode or document)."""
    write: Tensor | None = None
    """False: the token reads and does not write."""
    message: Tensor | None = None
    """Number of the chat message, -1: never written (system message, generation prompt)."""


@dataclass
class MemoryState:
    """State of one layer: `S` [B, N, r, r] (rows = values, columns = keys), fp32; the open message when writing by
    message."""

    S: Tensor
    pending: Pending | None = None

    @property
    def nbytes(self) -> int:
        held = [self.S] + ([] if self.pending is None else list(vars(self.pending).values()))
        return sum(x.nbytes for x in held)

    def select(self, rows: Tensor) -> MemoryState:
        """States of the given batch rows, in that order (forking, shuffling)."""
        pending = self.pending
        if pending is not None:
            pending = Pending(*(x[rows] for x in vars(pending).values()))
        return MemoryState(self.S[rows], pending)

    def detach(self) -> MemoryState:
        pending = self.pending
        if pending is not None:
            pending = Pending(*(x.detach() for x in vars(pending).values()))
        return MemoryState(self.S.detach(), pending)


@dataclass
class ScanResult:
    """reads [B, T, R]; the state after the call; beta and keep [B, T, N, r], the gates of each write, and where one was
    made."""

    reads: Tensor
    state: MemoryState
    beta: Tensor
    keep: Tensor
    written: Tensor

    def mean(self, gate: Tensor) -> Tensor:
        """Mean over written tokens of a gate [B, T, N, r]: a scalar, 0 without any."""
        return (gate.flatten(2).mean(-1) * self.written).sum() / self.written.sum().clamp(min=1)


def half_life(keep: float) -> float:
    """Writes after which half of a state is left, at this mean keep gate (nan: no write seen)."""
    if keep >= 1:
        return math.inf
    return 0.0 if keep == 0 else math.log(2) / -math.log(keep)


@dataclass(frozen=True)
class MemoryControl:
    """Evaluation switches; what changes states (zeroed, shuffled) is done on the states themselves."""

    scale: float = 1.0
    """Factor on both corrections; 0 = the plain backbone."""
    freeze: bool = False
    """No write at all."""

    @property
    def off(self) -> bool:
        """Whether nothing is corrected and nothing written: the plain backbone."""
        return self.scale == 0 and self.freeze


class DeltaMemory(nn.Module):
    """Parameters of one layer, named as in the published checkpoints, and the mathematics on them.

    Args:
        hidden_size: d of the backbone. query_size: H_q * d_h, all query heads (this rank's under tensor parallelism).
    """

    def __init__(
        self,
        config: DeltaMemConfig,
        hidden_size: int,
        query_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.hidden_size, self.query_size = config, hidden_size, query_size
        R, d = config.width, hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        self.memory_q_proj, self.memory_k_proj = parameter(R, d), parameter(R, d)
        self.memory_v_proj, self.beta_proj = parameter(R, d), parameter(config.gate_width, d)
        self.beta_bias = parameter(config.gate_width)
        if not config.couple_lambda:
            self.lambda_proj, self.lambda_bias = parameter(config.gate_width, d), parameter(config.gate_width)
        if "q_proj" in config.target_modules:
            self.delta_q_proj = parameter(query_size, R)
        if "o_proj" in config.target_modules:
            self.delta_o_proj = parameter(d, R)

    # ---- projections

    def in_proj(self) -> Tensor:
        """[C, d]: the rows of all projections in one matrix, queries first."""
        weights: list[Tensor] = [self.memory_q_proj, self.memory_k_proj, self.memory_v_proj, self.beta_proj]
        return self.shared(torch.cat(weights if self.config.couple_lambda else [*weights, self.lambda_proj]))

    def shared(self, weight: Tensor) -> Tensor:
        """A parameter (or several concatenated) that is replicated over ranks, before it is used; overridden where
        each rank computes only a part of its gradient."""
        return weight

    def project(self, x: Tensor) -> Tensor:
        """x [..., d] in any dtype -> raw projections [..., C], fp32 (fp64 stays)."""
        out = F.linear(x, self.in_proj().to(x.dtype))
        return out if out.dtype == torch.float64 else out.float()

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> MemoryState:
        N, r = self.config.num_states, self.config.rank
        S = torch.zeros(batch, N, r, r, device=device, dtype=dtype)
        pending = None
        if self.config.write == "message":
            pending = Pending.empty(batch, self.in_channels - self.config.width, S)
        return MemoryState(S, pending)

    @property
    def in_channels(self) -> int:
        """C of `project`."""
        gates = self.config.gate_width * (1 if self.config.couple_lambda else 2)
        return 3 * self.config.width + gates

    # ---- scan

    def _keys(self, raw: Tensor) -> Tensor:
        """[..., R] -> [..., N, r], tanh and unit length per state."""
        x = torch.tanh(raw).unflatten(-1, (self.config.num_states, self.config.rank))
        return F.normalize(x, dim=-1, eps=L2_EPS)

    def _gate(self, raw: Tensor, bias: Tensor) -> Tensor:
        """[..., gate_width] -> [..., N, r] in (0, 1)."""
        N, r = self.config.num_states, self.config.rank
        gate = torch.sigmoid(raw + self.shared(bias).to(raw.dtype)).unflatten(-1, (N, -1))
        return gate.expand(*gate.shape[:-1], r)

    def _write_features(self, raw: Tensor) -> dict[str, Tensor]:
        """Raw write features [..., C - R] -> k, v, beta, keep, erase, each [..., N, r]."""
        R, G, c = self.config.width, self.config.gate_width, self.config
        k, v, gates = raw[..., :R], raw[..., R : 2 * R], raw[..., 2 * R :]
        beta = self._gate(gates[..., :G], self.beta_bias)
        keep = 1 - beta if c.couple_lambda else self._gate(gates[..., G:], self.lambda_bias)
        erase = keep * beta if c.update == "lambda_outside" else beta
        keep = torch.ones_like(beta) if c.update == "no_lambda" else keep
        v = v.unflatten(-1, (c.num_states, c.rank))
        return {"k": self._keys(k), "v": v, "beta": beta, "keep": keep, "erase": erase}

    def scan(
        self, raw: Tensor, state: MemoryState, inputs: MemoryInputs, *, freeze: bool = False, backend: str = "auto"
    ) -> ScanResult:
        """Read, then write, token after token.

        Args:
            raw: [B, T, C] of `project`, whole rows (all tokens of the sequence in order).
            state: before the first token. freeze: nothing is written (a control).

        Raises:
            ValueError: writes by message without message ids, or resets inside a call with `pre_call` reads.
        """
        B, T, _ = raw.shape
        R, config = self.config.width, self.config
        no = torch.zeros(B, T, dtype=torch.bool, device=raw.device)
        valid = ~no if inputs.valid is None else inputs.valid
        reset = no if inputs.reset is None else inputs.reset
        write = valid if inputs.write is None else valid & inputs.write
        write = no if freeze else write
        q = self._keys(raw[..., :R])
        if config.memory == "static":
            beta = torch.zeros_like(q)
            return ScanResult((q * valid[..., None, None]).flatten(2), state, beta, 1 - beta, no)
        rows, pending, S = raw[..., R:], state.pending, state.S
        if config.write == "message" and not self._falls_back(inputs) and not freeze:
            rows, write, pending, S = self._messages(rows, state, inputs, valid, reset, write)
        features = self._write_features(rows)
        before = S
        reads, S = delta_mem_scan(
            q, features["k"], features["v"], features["beta"], keep=features["keep"], erase=features["erase"],
            initial_state=S, reset=reset, write_mask=write, backend=backend,
        )  # fmt: skip
        if config.write == "message" and config.message_read == "pre_call":
            if inputs.reset is not None and bool(reset[:, 1:].any()):
                raise ValueError("message_read='pre_call' cannot reset inside a call: use 'streaming'")
            start = torch.where(reset[:, 0, None, None, None], 0.0, before) if T else before
            reads = torch.einsum("bnij,btnj->btni", start, q)
        reads = (reads * valid[..., None, None]).flatten(2)
        return ScanResult(reads, MemoryState(S, pending), features["beta"], features["keep"], write)

    def _falls_back(self, inputs: MemoryInputs) -> bool:
        if self.config.message_fallback == "token":
            return inputs.message is None or not bool((inputs.message >= 0).any())
        if inputs.message is None:
            raise ValueError(
                "delta_mem.write = 'message' needs the message number of every token: pass MemoryInputs.message, "
                "or set delta_mem.message_fallback to 'token'"
            )
        return False

    def _messages(self, rows, state, inputs, valid, reset, write):
        """Raw write features by message, the write mask, the pending message and the state with a finished one."""
        assert inputs.message is not None and state.pending is not None
        ids = torch.where(write, inputs.message, -1)
        if self.config.message_read == "pre_call":  # every call writes what it has, split messages twice
            none = Pending.empty(rows.shape[0], rows.shape[2], rows)
            runs = find_runs(ids, valid, reset, none.message)
            means, _, _, _ = message_writes(rows, runs, ids, none)
            return means, runs.member & runs.last, state.pending, state.S
        runs = find_runs(ids, valid, reset, state.pending.message)
        means, over, commit, pending = message_writes(rows, runs, ids, state.pending)
        return means, over, pending, self._commit(state, commit)

    def _commit(self, state: MemoryState, rows: Tensor) -> Tensor:
        """[B, N, r, r]: the pending message written where `rows` [B] says."""
        assert state.pending is not None
        f = {name: x[:, None] for name, x in self._write_features(state.pending.mean.to(state.S.dtype)).items()}
        k = f.pop("k")
        _, S = delta_mem_scan(k, k, f["v"], f["beta"], keep=f["keep"], erase=f["erase"], initial_state=state.S,
                              write_mask=rows[:, None])  # fmt: skip
        return S

    def finish(self, state: MemoryState) -> MemoryState:
        """The open message written now: what the next token of another message would read."""
        if state.pending is None:
            return state
        S = self._commit(state, state.pending.count > 0)
        return MemoryState(S, Pending.empty(S.shape[0], state.pending.total.shape[1], S))

    # ---- corrections

    def delta_q(self, reads: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """reads [..., R] -> correction of the raw query [..., query_size]."""
        return _linear(reads.to(dtype), self.delta_q_proj.to(dtype)) * (scale * self.config.scale)

    def delta_o(self, reads: Tensor, output: Tensor, scale: float = 1.0) -> Tensor:
        """reads [..., R] -> correction of the attention's output [..., d], not longer than `max_output_ratio` of it."""
        weight = self.shared(self.delta_o_proj).to(output.dtype)
        change = _linear(reads.to(output.dtype), weight) * (scale * self.config.scale)
        if not self.config.max_output_ratio:
            return change
        wide = torch.promote_types(output.dtype, torch.float32)
        most = self.config.max_output_ratio * output.to(wide).norm(dim=-1, keepdim=True)
        length = change.to(wide).norm(dim=-1, keepdim=True)
        return change * (most / torch.maximum(length, most).clamp_min(TINY)).to(change.dtype)

    # ---- initialisation

    @torch.no_grad()
    def initialise(self, seed: int, name: str, query_weight: Tensor, output_weight: Tensor) -> None:
        """Draw every parameter from seeds of its name: the same at every layout.

        Args:
            query_weight: W_Q [all query heads * d_h, d] of the layer. output_weight: W_O [d, all query heads * d_h].
                Under tensor parallelism pass the whole weights, and cut `delta_q_proj` afterwards.
        """
        bound = 1 / math.sqrt(self.hidden_size)  # kaiming_uniform(a = sqrt 5)
        for key in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
            weight = getattr(self, key)
            weight.copy_(_uniform(weight.shape, bound, seed, f"{name}.{key}"))
        self.beta_proj.zero_()
        beta, keep = self.config.gate_biases
        self.beta_bias.fill_(beta)
        if not self.config.couple_lambda:
            self.lambda_proj.zero_()
            self.lambda_bias.fill_(keep)
        for head, base in (("q", query_weight), ("o", output_weight)):
            if f"{head}_proj" in self.config.target_modules:
                key = f"delta_{head}_proj"
                getattr(self, key).copy_(steering_start(self.config, base, seed, f"{name}.{key}"))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of x [..., R]; torch copies the weight for each row of a tensor that is not contiguous."""
    return F.linear(x.contiguous(), weight)


def _uniform(shape: torch.Size, bound: float, seed: int, key: str) -> Tensor:
    return (torch.rand(shape, generator=named_generator(seed, key)) * 2 - 1) * bound


def steering_start(config: DeltaMemConfig, base: Tensor, seed: int, key: str) -> Tensor:
    """Start of a steering head [rows of base, R], fp32.

    `base_slice`: the first R input columns of the base weight, each of unit length, times the gain;
    `base_slice_fixed`: min(r, `reference_width`) of them. Further columns (with several states, all but the first
    state's) start at zero.
    """
    out = torch.zeros(base.shape[0], config.width)
    if config.output_init == "random":
        return _uniform(out.shape, config.output_gain / math.sqrt(config.width), seed, key)
    if config.output_init != "zero":
        columns = min(config.width, base.shape[1])
        if config.output_init == "base_slice_fixed":
            columns = min(columns, config.rank, config.reference_width)
        part = base[:, :columns].detach().float().cpu()
        out[:, :columns] = config.output_gain * part / part.norm(dim=0).clamp_min(1e-12)
    return out
