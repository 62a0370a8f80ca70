"""δ-mem on Hugging Face models: where the corrections enter, cuts between calls, padding, controls, gradients."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import MemoryControl, MemoryInputs, MemoryState
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.serving.hf_model import DeltaMemModel, attach, select_states
from tests.support.tiny_hf import CONFIGS, FAMILIES, LENGTH, build_adapted, build_base, tokens

MESSAGE = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, -1]).expand(2, LENGTH)


def inputs_of(model: DeltaMemModel, start: int = 0, end: int = LENGTH) -> MemoryInputs:
    return MemoryInputs(message=MESSAGE[:, start:end] if model.config.write == "message" else None)


def in_calls(model: DeltaMemModel, ids: Tensor, cuts: list[int]) -> tuple[Tensor, dict[int, MemoryState]]:
    """Logits and states with the row fed in pieces, with a cache."""
    cache, states, logits = DynamicCache(), None, []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:end], states=states, inputs=inputs_of(model, start, end), past_key_values=cache,
                    use_cache=True)  # fmt: skip
        states = out.states
        logits.append(out.logits)
    return torch.cat(logits, 1), states


def difference(a: dict[int, MemoryState], b: dict[int, MemoryState]) -> float:
    assert a.keys() == b.keys()
    return torch.stack([(a[layer].S - b[layer].S).abs().max() for layer in a]).max().item()  # nan stays nan


# ---- acceptance 1, 2: identity


@pytest.mark.parametrize("family", FAMILIES)
def test_first_token_is_bitwise_the_base_models_and_later_ones_are_not(family):
    model, ids = build_adapted(family=family), tokens()
    with torch.no_grad():
        for length in (1, LENGTH):
            base, got = model.base(ids[:, :length]).logits, model(ids[:, :length]).logits
            assert torch.equal(got[:, 0], base[:, 0])
        assert (got - base)[:, 1:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_start_changes_no_bit_until_it_is_trained(family):
    model, ids = attach(build_base(family), DeltaMemConfig(output_init="zero")), tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.base(ids).logits)
    model(ids).logits.square().sum().backward()
    assert all(memory.delta_q_proj.grad.abs().max() > 0 for memory in model.memories.values())


# ---- acceptance 3, 4: cuts


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_cuts_between_calls_do_not_matter(family, name, dtype, close):
    """Logits relative to the largest."""
    model, ids = build_adapted(CONFIGS[name], base=build_base(family, dtype=dtype)), tokens()
    with torch.no_grad():
        whole, states = in_calls(model, ids, [])
        for cuts in ([4, 9], list(range(1, LENGTH))):
            logits, after = in_calls(model, ids, cuts)
            assert (logits - whole).abs().max() < 5 * close * whole.abs().max() and difference(after, states) < close
        plain = model.base(ids).logits
    assert (whole - plain).abs().max() > 1e-2


def test_pre_call_reads_leave_a_single_call_alone_and_then_remember_it():
    model, ids = build_adapted(DeltaMemConfig(write="message", message_read="pre_call")), tokens()
    with torch.no_grad():
        out = model(ids, inputs=MemoryInputs(message=MESSAGE))
        assert torch.equal(out.logits, model.base(ids).logits)
        assert all(state.S.norm() > 0.1 for state in out.states.values())
        again = model(ids, states=out.states, inputs=MemoryInputs(message=MESSAGE))
    assert (again.logits - out.logits).abs().max() > 1e-2


def test_message_writes_without_numbers_are_refused():
    with pytest.raises(ValueError, match="message_fallback"):
        build_adapted(CONFIGS["SSW"])(tokens())


# ---- acceptance 5: padding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_rows_are_what_they_are_alone(family, side):
    model, ids, lengths = build_adapted(family=family), tokens(3), [LENGTH, 5, 1]
    mask = torch.stack([torch.arange(LENGTH) < n for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    if side == "middle":
        mask[1] = torch.arange(LENGTH) % 4 < 2
    with torch.no_grad():
        out = model(ids, attention_mask=mask.long())
        for row in range(3):
            alone = model(ids[row, mask[row]][None])
            assert (out.logits[row, mask[row]] - alone.logits[0]).abs().max() < 2e-5
            assert difference(select_states(out.states, [row]), alone.states) < 1e-6


# ---- where the corrections enter


def by_hand(model: DeltaMemModel, layer: int, x: Tensor) -> Tensor:
    """Output of one self-attention [B, T, d], from the equations: plain loops and matrices, own recurrence."""
    attention, memory, c = model.base.model.layers[layer].self_attn, model.memories[str(layer)], model.config
    B, T, _ = x.shape
    unit = lambda y: (lambda z: z / z.norm(dim=-1, keepdim=True))(torch.tanh(y))  # noqa: E731
    q, k, v = unit(x @ memory.memory_q_proj.T), unit(x @ memory.memory_k_proj.T), x @ memory.memory_v_proj.T
    beta = torch.sigmoid(x @ memory.beta_proj.T + memory.beta_bias)
    S, reads = torch.zeros(B, c.rank, c.rank, dtype=x.dtype), []
    for t in range(T):
        reads.append(torch.einsum("bij,bj->bi", S, q[:, t]))
        error = v[:, t] - torch.einsum("bij,bj->bi", S, k[:, t])
        S = (1 - beta[:, t])[..., None] * S + (beta[:, t] * error)[..., None] * k[:, t, None, :]
    r = torch.stack(reads, 1)
    heads = lambda y: y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    query = heads(x @ attention.q_proj.weight.T + c.alpha / c.rank * r @ memory.delta_q_proj.T)
    key, value = heads(x @ attention.k_proj.weight.T), heads(x @ attention.v_proj.weight.T)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if getattr(attention, "use_rope", True):
        cos, sin = model.base.model.rotary_emb(x, position_ids=torch.arange(T)[None])
        query, key = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (query, key))
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(attention.head_dim)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    mixed = (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
    return mixed @ attention.o_proj.weight.T + c.alpha / c.rank * r @ memory.delta_o_proj.T


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_the_equations(family):
    """Also SmolLM3's layer without positions, and Qwen3's norm between correction and rotation."""
    model, seen = build_adapted(base=build_base(family, dtype=torch.float64)), {}
    for at, layer in enumerate(model.base.model.layers):

        def keep(module, args, kwargs, output, at=at):
            seen[at] = kwargs["hidden_states"], output[0]

        layer.self_attn.register_forward_hook(keep, with_kwargs=True)  # after the model's own hooks
    with torch.no_grad():
        model(tokens())
        for at, (x, got) in seen.items():
            torch.testing.assert_close(got, by_hand(model, at, x), rtol=0, atol=1e-12)
    assert len(seen) == 3


def test_heads_and_layers_of_the_config_alone_are_steered():
    ids = tokens()
    for head in "qo":
        model = build_adapted(DeltaMemConfig(target_modules=(f"{head}_proj",), layers_to_transform=(1,)))
        steering = {name.rpartition(".")[2] for name in model.state_dict() if "delta" in name}
        assert model.layers == [1] and steering == {f"delta_{head}_proj"}
        with torch.no_grad():
            assert (model(ids).logits - model.base(ids).logits).abs().max() > 1e-3


# ---- gradients


def test_gradients_reach_the_adapter_alone_and_pass_through_the_states():
    """The row in one call = in two calls joined by states and cache, every gradient, in float64."""
    model, ids = build_adapted(base=build_base("qwen3", dtype=torch.float64)), tokens()
    weights = torch.randn(2, LENGTH, 260, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = []
    for cuts in ([], [5, 8]):
        model.zero_grad()
        (in_calls(model, ids, cuts)[0] * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        assert want.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-9, atol=1e-10, msg=name)
    assert all(p.grad is None for p in model.base.parameters())


def test_read_pass_trains_the_write_pass():
    model, ids = build_adapted(), tokens()
    written = model(ids[:, :8]).states
    detached = {layer: state.detach() for layer, state in written.items()}
    reading = MemoryInputs(write=torch.zeros(2, LENGTH - 8, dtype=torch.bool))
    for states, reaches in ((written, True), (detached, False)):
        model.zero_grad()
        out = model(ids[:, 8:], states=states, inputs=reading)
        assert difference(out.states, written) == 0
        out.logits.square().sum().backward(retain_graph=True)
        gradients = [memory.memory_v_proj.grad for memory in model.memories.values()]
        assert all((g is not None and g.abs().max() > 0) == reaches for g in gradients)


def test_activation_checkpointing_changes_nothing():
    model, ids, gradients = build_adapted(), tokens(), []
    for on in (False, True):
        if on:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
            model.base.train()
        model.zero_grad()
        out = model(ids)
        (out.logits.square().sum() + sum(state.S.sum() for state in out.states.values())).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- acceptance 14: controls


def test_scale_zero_is_the_plain_model_whose_memory_still_writes():
    model, ids = build_adapted(), tokens()
    with torch.no_grad():
        out = model(ids, control=MemoryControl(scale=0.0), stats=True)
        assert torch.equal(out.logits, model.base(ids).logits)
        half = model(ids, control=MemoryControl(scale=0.5)).logits
    assert all(state.S.norm() > 0 for state in out.states.values()) and out.stats[0].output_ratio == 0
    assert (half - out.logits).abs().max() > 1e-3


def test_freeze_reads_and_keeps_the_state():
    model, ids = build_adapted(), tokens()
    with torch.no_grad():
        states = model(ids).states
        out = model(ids, states=states, control=MemoryControl(freeze=True))
        empty = model(ids, control=MemoryControl(freeze=True))
        assert difference(out.states, states) == 0 and torch.equal(empty.logits, model.base(ids).logits)
        assert (out.logits - empty.logits).abs().max() > 1e-2


def test_off_is_the_plain_model_that_passes_its_states_on():
    model, ids = build_adapted(), tokens()
    with torch.no_grad():
        states = model(ids).states
        out = model(ids, states=states, control=MemoryControl(scale=0.0, freeze=True))
        assert difference(out.states, states) == 0 and torch.equal(out.logits, model.base(ids).logits)
        measured = model(ids, states=states, control=MemoryControl(scale=0.0, freeze=True), stats=True)
    assert measured.stats.keys() == states.keys() and measured.stats[0].output_ratio == 0


def test_states_of_other_rows_answer_for_those_rows():
    """Shuffling moves the answers with the states; copying a row gives the same answer twice."""
    model, told, asked = build_adapted(), tokens(2, seed=3), tokens(1, seed=4).expand(2, -1)
    with torch.no_grad():
        states = model(told).states
        kept, shuffled = (model(asked, states=select_states(states, rows)).logits for rows in ([0, 1], [1, 0]))
        forked = model(asked, states=select_states(states, [1, 1])).logits
    assert (kept[0] - kept[1]).abs().max() > 1e-2
    torch.testing.assert_close(shuffled, kept.flip(0), rtol=0, atol=2e-5)
    assert torch.equal(forked[0], forked[1])


def test_static_adapter_has_the_same_size_and_no_memory():
    model, ids = build_adapted(DeltaMemConfig(memory="static")), tokens()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build_adapted().parameters())
    with torch.no_grad():
        out = model(ids)
        assert (out.logits - model.base(ids).logits)[:, 0].abs().max() > 1e-2  # also the first token
        assert all(not state.S.any() for state in out.states.values())
        assert torch.equal(model(ids, states=out.states).logits, out.logits)


# ---- statistics, life with others


def test_statistics_are_those_of_the_call():
    model, ids = build_adapted(), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :6] = 0
    seen = {}
    model.base.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: seen.update(o=out))
    model.base.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: seen.update(y=out[0]))
    model.base.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(x=a[0]))
    with torch.no_grad():
        out = model(ids, attention_mask=mask, stats=True)
        memory, real = model.memories["1"], mask.bool()
        beta = torch.sigmoid(seen["x"] @ memory.beta_proj.T + memory.beta_bias)[real].mean().item()
        ratio = ((seen["y"] - seen["o"])[real].norm() / seen["o"][real].norm()).item()
    got = out.stats[1]
    assert got.written == 20 and got.mean_beta == pytest.approx(beta, rel=1e-5)
    assert got.output_ratio == pytest.approx(ratio, rel=1e-4) and got.mean_keep == pytest.approx(1 - beta)
    assert model(ids).stats == {}


def test_a_cut_short_call_and_a_second_adapter_leave_no_trace():
    base, ids = build_base(), tokens()
    first, second = build_adapted(base=base), build_adapted(CONFIGS["MSW"], base=base)
    with torch.no_grad():
        plain, want = base(ids).logits, [m(ids).logits for m in (first, second)]
        breaks = base.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first(ids)
        breaks.remove()
        assert torch.equal(base(ids).logits, plain)
        assert torch.equal(first(ids).logits, want[0]) and torch.equal(second(ids).logits, want[1])
        assert not torch.equal(want[0], want[1])
        first.detach()
        assert torch.equal(base(ids).logits, plain) and torch.equal(second(ids).logits, want[1])


def test_threads_share_one_model():
    model = build_adapted()
    rows = [tokens(1, 40, seed) for seed in range(6)]
    with torch.no_grad():
        want = [model(row).logits for row in rows]

    @torch.no_grad()
    def run(at: int) -> bool:
        return all(torch.equal(model(rows[at]).logits, want[at]) for _ in range(8))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(6)))


def test_what_does_not_fit_is_refused_by_name():
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8))
    with pytest.raises(CheckpointError, match=r"model_type = gpt2 .*use a model of one of LlamaForCausalLM .*smollm3"):
        attach(other, DeltaMemConfig())
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        attach(build_base(), DeltaMemConfig(layers_to_transform=(0, 3)))
    model = build_adapted()
    with pytest.raises(ValueError, match=r"\[2\] rows do not fit: .* 3 rows"):
        model(tokens(3), states=model.initial_states(2))
