"""One layer of δ-mem: counts, cuts between calls, padding, packed documents, writes by message, controls."""

import pytest
import torch
from torch import Tensor

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import DeltaMemory, MemoryInputs, MemoryState, steering_start
from megatron_dla.errors import ConfigError

D, Q = 12, 20
VARIANTS = {
    "TSW": DeltaMemConfig(),
    "MSW": DeltaMemConfig(num_states=3, rowwise_gates=False),
    "SSW": DeltaMemConfig(write="message"),
    "uncoupled": DeltaMemConfig(couple_lambda=False, update="lambda_outside"),
    "no_lambda": DeltaMemConfig(update="no_lambda"),
}


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("writes", [0.5, 3.4, 280.0])
def test_half_of_a_state_is_left_after_the_half_life(writes: float, coupled: bool) -> None:
    config = DeltaMemConfig(half_life=writes, couple_lambda=coupled)
    memory = DeltaMemory(config, D, Q, dtype=torch.float64)
    memory.initialise(0, "layer", torch.randn(Q, D), torch.randn(D, Q))
    keep = memory._write_features(memory.project(torch.randn(D, dtype=torch.float64))[config.width :])["keep"]
    torch.testing.assert_close(keep**writes, torch.full_like(keep, 0.5), rtol=1e-9, atol=0)
    assert memory.beta_bias[0].item() == pytest.approx(-1.5, abs=1e9 if coupled else 0)


@pytest.mark.parametrize("key", ["half_life", "max_output_ratio"])
@pytest.mark.parametrize("value", [-1.0, True, "2", float("nan")])
def test_wrong_bounds_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"delta_mem\.{key} = {value!r}"):
        DeltaMemConfig(**{key: value})
    with pytest.raises(ConfigError, match=r"half_life = 1e-06.*0\.01"):
        DeltaMemConfig(half_life=1e-6)


def build(config: DeltaMemConfig) -> DeltaMemory:
    torch.manual_seed(0)
    memory = DeltaMemory(config, D, Q, dtype=torch.float64)
    memory.initialise(3, "layer", torch.randn(Q, D), torch.randn(D, Q))
    with torch.no_grad():
        for parameter in memory.parameters():  # gates that depend on the token, every column of the heads in use
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def tokens(B: int = 3, T: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    message = torch.tensor([-1, -1, 0, 0, 0, 1, 2, 2, 2, 2, -1, 3, 3, 4, 4, 4, -1])[:T].expand(B, T).clone()
    message[1] = torch.arange(T) // 4
    return x, message


def recurrence(memory: DeltaMemory, x: Tensor, valid: Tensor, reset: Tensor, write: Tensor, ids: Tensor) -> Tensor:
    """Reads [B, T, R], token by token in plain loops."""
    config, reads = memory.config, torch.zeros(*x.shape[:2], memory.config.width, dtype=x.dtype)
    for b in range(x.shape[0]):
        S, held, name = torch.zeros(config.num_states, config.rank, config.rank, dtype=x.dtype), [], -1

        def put(vector: Tensor, S: Tensor) -> Tensor:
            f = memory._write_features(memory.project(vector)[config.width :])
            wrong = torch.einsum("nij,nj->ni", S, f["k"])
            change = f["beta"] * f["v"] - f["erase"] * wrong
            return f["keep"][..., None] * S + change[..., None] * f["k"][:, None, :]

        for t in range(x.shape[1]):
            if reset[b, t]:
                S, held, name = torch.zeros_like(S), [], -1
            if not valid[b, t]:
                continue
            mine = int(ids[b, t]) if write[b, t] else -1
            if config.write == "message" and held and mine != name:
                S, held = put(torch.stack(held).mean(0), S), []
            name = mine
            q = memory._keys(memory.project(x[b, t])[: config.width])
            reads[b, t] = torch.einsum("nij,nj->ni", S, q).flatten()
            if config.write == "message":
                held += [x[b, t]] if mine >= 0 else []
            elif write[b, t]:
                S = put(x[b, t], S)
    return reads


@pytest.mark.parametrize("name", VARIANTS)
def test_scan_equals_the_recurrence_with_padding_resets_and_read_only_tokens(name: str) -> None:
    memory = build(VARIANTS[name])
    x, message = tokens()
    valid, write = torch.ones(3, 17, dtype=torch.bool), torch.ones(3, 17, dtype=torch.bool)
    reset = torch.zeros(3, 17, dtype=torch.bool)
    valid[0, :3], valid[1, 12:], valid[2, 6:8] = False, False, False
    write[0, 9:11], write[2, 14:] = False, False
    reset[1, 6] = reset[2, 0] = reset[2, 7] = reset[0, 12] = True
    inputs = MemoryInputs(valid, reset, write, message)
    result = memory.scan(memory.project(x), memory.initial_state(3, "cpu", torch.float64), inputs)
    want = recurrence(memory, x, valid, reset, write, message)
    torch.testing.assert_close(result.reads, want, rtol=1e-9, atol=1e-10)
    assert result.reads[~valid].abs().max() == 0
    assert want.abs().max() > 0.05


@pytest.mark.parametrize("name", VARIANTS)
def test_where_calls_are_cut_changes_nothing(name: str) -> None:
    memory = build(VARIANTS[name])
    x, message = tokens()
    raw = memory.project(x)
    whole = memory.scan(raw, memory.initial_state(3, "cpu", torch.float64), MemoryInputs(message=message))
    for cuts in ([5], [3, 4, 9], list(range(1, 17))):
        state, reads = memory.initial_state(3, "cpu", torch.float64), []
        for a, b in zip([0, *cuts], [*cuts, 17], strict=True):
            result = memory.scan(raw[:, a:b], state, MemoryInputs(message=message[:, a:b]))
            state, reads = result.state, [*reads, result.reads]
        torch.testing.assert_close(torch.cat(reads, 1), whole.reads, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(memory.finish(state).S, memory.finish(whole.state).S, rtol=1e-9, atol=1e-11)


def test_a_row_of_padding_leaves_state_and_open_message_untouched() -> None:
    memory = build(VARIANTS["SSW"])
    x, message = tokens()
    raw = memory.project(x)
    first = memory.scan(raw[:, :4], memory.initial_state(3, "cpu", torch.float64), MemoryInputs(message=message[:, :4]))
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1] = False
    state = memory.scan(raw[:, 4:9], first.state, MemoryInputs(valid=valid, message=message[:, 4:9])).state
    assert torch.equal(state.S[1], first.state.S[1])
    assert first.state.pending is not None and state.pending is not None
    for was, now in zip(vars(first.state.pending).values(), vars(state.pending).values(), strict=True):
        assert torch.equal(was[1], now[1]) and (was.dtype != torch.float64 or not torch.equal(was[0], now[0]))


def test_by_message_the_first_call_reads_nothing_in_the_published_form_and_streaming_reads_earlier_messages() -> None:
    x, message = tokens()
    for mode, silent in (("pre_call", True), ("streaming", False)):
        memory = build(DeltaMemConfig(write="message", message_read=mode))
        start = memory.initial_state(3, "cpu", torch.float64)
        result = memory.scan(memory.project(x), start, MemoryInputs(message=message))
        assert bool((result.reads == 0).all()) == silent
        assert memory.finish(result.state).S.abs().max() > 0.01


def test_message_writes_without_ids_are_refused_unless_asked_to_fall_back() -> None:
    x, _ = tokens()
    memory = build(DeltaMemConfig(write="message"))
    with pytest.raises(ValueError, match="message_fallback"):
        memory.scan(memory.project(x), memory.initial_state(3, "cpu", torch.float64), MemoryInputs())
    by_token, fallback = build(DeltaMemConfig()), build(DeltaMemConfig(write="message", message_fallback="token"))
    results = [
        m.scan(m.project(x), m.initial_state(3, "cpu", torch.float64), MemoryInputs()) for m in (by_token, fallback)
    ]
    assert torch.equal(results[0].reads, results[1].reads)


def test_first_token_after_a_reset_reads_zero_whatever_the_start() -> None:
    memory = build(VARIANTS["TSW"])
    x, _ = tokens()
    reset = torch.zeros(3, 17, dtype=torch.bool)
    reset[:, 8] = True
    state = MemoryState(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    reads = memory.scan(memory.project(x), state, MemoryInputs(reset=reset)).reads
    assert reads[:, 8].abs().max() == 0 and reads[:, 0].abs().max() > 0 and reads[:, 9].abs().max() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    memory = build(VARIANTS[name])
    x, message = tokens()
    result = memory.scan(
        memory.project(x), memory.initial_state(3, "cpu", torch.float64), MemoryInputs(message=message)
    )
    out = memory.delta_q(result.reads, x.dtype).sum() + memory.delta_o(result.reads, x).square().sum()
    (out + memory.finish(result.state).S.square().sum()).backward()
    zero = [n for n, p in memory.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert zero == []


@pytest.mark.parametrize("name", ["TSW", "SSW", "uncoupled"])
def test_mean_gates_are_those_of_the_writes(name: str) -> None:
    """Not of padding, nor of tokens that only read; by message, one gate a message."""
    memory = build(VARIANTS[name])
    x, message = (y[:1] for y in tokens())
    valid, write = torch.ones(1, 17, dtype=torch.bool), torch.ones(1, 17, dtype=torch.bool)
    valid[:, :1] = write[:, 9:] = False
    written = list(x[0, 1:9])
    if name == "SSW":  # message 2 is cut short by the tokens that do not write
        written = [x[0, span].mean(0) for span in (slice(2, 5), slice(5, 6), slice(6, 9))]
    inputs = MemoryInputs(valid=valid, write=write, message=message)
    result = memory.scan(memory.project(x), memory.initial_state(1, "cpu", x.dtype), inputs)
    features = [memory._write_features(memory.project(y)[memory.config.width :]) for y in written]
    for gate in ("beta", "keep"):
        want = torch.stack([f[gate] for f in features]).mean()
        torch.testing.assert_close(result.mean(getattr(result, gate)), want)
        assert abs(want - getattr(result, gate).mean()) > 1e-3


def test_controls() -> None:
    x, _ = tokens()
    memory = build(VARIANTS["TSW"])
    start = MemoryState(torch.randn(3, 1, 8, 8, dtype=torch.float64))
    frozen = memory.scan(memory.project(x), start, MemoryInputs(), freeze=True)
    assert torch.equal(frozen.state.S, start.S) and not frozen.written.any()
    assert memory.delta_o(frozen.reads, x, scale=0.0).abs().max() == 0
    static = build(DeltaMemConfig(memory="static"))
    reads = static.scan(static.project(x), static.initial_state(3, "cpu", torch.float64), MemoryInputs()).reads
    assert torch.allclose(reads.norm(dim=-1), torch.ones(3, 17, dtype=torch.float64))
    shuffled = start.select(torch.tensor([2, 0, 1]))
    assert torch.equal(shuffled.S[0], start.S[2])


def test_a_frozen_call_writes_nothing_not_even_the_open_message() -> None:
    x, message = tokens()
    memory = build(VARIANTS["SSW"])
    raw = memory.project(x)
    start = memory.initial_state(3, "cpu", torch.float64)
    opened = memory.scan(raw[:, :8], start, MemoryInputs(message=message[:, :8])).state
    later = MemoryInputs(message=message[:, 8:])
    frozen = memory.scan(raw[:, 8:], opened, later, freeze=True)
    assert torch.equal(frozen.state.S, opened.S) and not frozen.written.any()
    assert not torch.equal(memory.scan(raw[:, 8:], opened, later).state.S, opened.S)


def test_parameter_counts_of_qwen3_4b() -> None:
    for config, want in ((DeltaMemConfig(), 4_866_336), (DeltaMemConfig(num_states=4), 19_465_344)):
        assert 36 * config.count_parameters(2560, 4096) == want
        with torch.device("meta"):
            built = DeltaMemory(config, 2560, 4096)
        assert 36 * sum(p.numel() for p in built.parameters()) == want
    for config in VARIANTS.values():
        assert sum(p.numel() for p in build(config).parameters()) == config.count_parameters(D, Q)


def test_steering_starts() -> None:
    base = torch.randn(Q, D)
    fixed = steering_start(DeltaMemConfig(num_states=2), base, 0, "k")
    torch.testing.assert_close(fixed[:, :8].norm(dim=0), torch.full((8,), 0.05))
    assert fixed[:, 8:].abs().max() == 0
    torch.testing.assert_close(fixed[:, 3] / fixed[0, 3], base[:, 3] / base[0, 3])
    wide = steering_start(DeltaMemConfig(num_states=2, output_init="base_slice"), base, 0, "k")
    assert (wide.norm(dim=0) > 0).sum() == D
    assert steering_start(DeltaMemConfig(output_init="zero"), base, 0, "k").abs().max() == 0
    drawn = [steering_start(DeltaMemConfig(output_init="random"), base, 0, k) for k in ("k", "k", "other")]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4}, "delta_mem.rank = 4"),
        ({"num_states": 9}, "delta_mem.num_states = 9"),
        ({"write": "word"}, "delta_mem.write = 'word'"),
        ({"heads": ["q", "k"]}, "delta_mem.target_modules"),
        ({"ranks": 8}, "delta_mem.ranks: unknown key"),
        ({"update": "no_lambda", "couple_lambda": False}, "delta_mem.update"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        DeltaMemConfig.from_dict(values)
