"""δ-mem in Megatron's attention, in one process: the paper's equations, and forms of rows that do not matter."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.delta_mem import add_memories, freeze_backbone, memory_layers, with_memory
from megatron_dla.adapters.memory import MemoryControl, MemoryInputs, MemoryState, half_life
from megatron_dla.config import ModelSection, ParallelSection
from megatron_dla.errors import ConfigError
from megatron_dla.model.gpt import build_model, packed_sequence, transformer_config
from megatron_dla.model.spec import block_spec
from megatron_dla.parallel.groups import initialize_distributed, process_groups
from tests.support.workers import BASE_SECTION, check, errors, lay_out, perturb

SECTION = dataclasses.replace(BASE_SECTION, pattern="A")
NORMED = dataclasses.replace(SECTION, qk_norm=True, attention_head_dim=10)
S, B, VOCAB = 24, 2, 60
TSW, MSW = DeltaMemConfig(), DeltaMemConfig(num_states=2)
BOUNDED = DeltaMemConfig(num_states=2, max_output_ratio=0.06)
VARIANTS = {
    "TSW": (SECTION, TSW),
    "MSW, q-norm": (NORMED, MSW),
    "SSW": (SECTION, DeltaMemConfig(write="message")),
    "bounded": (SECTION, BOUNDED),
    "TSW, hybrid": (dataclasses.replace(BASE_SECTION, pattern="DA"), TSW),
}


def build(section: ModelSection, config: DeltaMemConfig | None, recompute="none", perturbed=True, dtype=torch.float64):
    """A model, with rotary angles in float64 too where it is; every parameter moved off its start."""
    initialize_distributed("cpu")
    lay_out(1)
    model = build_model(section, ParallelSection(), vocab_size=VOCAB, seq_len=S, seed=2, dtype=dtype,
                        recompute=recompute, delta_mem=config)  # fmt: skip
    if dtype == torch.float64:
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.double()
    if perturbed:
        perturb(model, section)
    return model


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int = 6) -> tuple[Tensor, Tensor]:
    """Ids [B, S] and message numbers."""
    ids = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))
    return ids, torch.stack([torch.arange(S) // 3, torch.arange(S) // 4 - 1])


def flags(*true: int) -> Tensor:
    """bool [B, S], True in these columns."""
    found = torch.zeros(B, S, dtype=torch.bool)
    found[:, list(true)] = True
    return found


def ends(*borders: int, rows: int = B, length: int = S) -> Tensor:
    """cu_seqlens of rows that are all cut at `borders`."""
    cuts = [row * length + cut for row in range(rows) for cut in (0, *borders)]
    return torch.tensor([*cuts, rows * length], dtype=torch.int32)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.abs().max() > 0 for g in found.values())
    return found


# ---- against the equations


def rotate(x: Tensor, inverse: Tensor) -> Tensor:
    """RoPE of [S, B, heads, D], halves."""
    angles = torch.outer(torch.arange(x.shape[0], dtype=torch.float64), inverse)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def read_by_token(x: Tensor, p: dict[str, Tensor], config: DeltaMemConfig) -> Tensor:
    """x [S, d] -> reads [S, R]: eq. 4-6 and 10-12 of the paper, state by state."""
    N, r, reads = config.num_states, config.rank, []
    states = [x.new_zeros(r, r)] * N
    for token in x:
        row = []
        for n in range(N):
            mine = slice(n * r, (n + 1) * r)
            q, k = (F.normalize(torch.tanh(p[f"memory_{key}_proj"][mine] @ token), dim=0) for key in "qk")
            v, gate = (
                p["memory_v_proj"][mine] @ token,
                torch.sigmoid(p["beta_proj"][mine] @ token + p["beta_bias"][mine]),
            )
            row.append(states[n] @ q)
            states[n] = torch.diag(1 - gate) @ states[n] + torch.outer(gate * (v - states[n] @ k), k)
        reads.append(torch.cat(row))
    return torch.stack(reads)


def attention_by_hand(x: Tensor, layer: torch.nn.Module, section: ModelSection, inverse: Tensor) -> Tensor:
    """The attention layer with its memory, [S, B, d], from its parameters."""
    p, config = dict(layer.delta_mem.named_parameters()), layer.delta_mem.config
    size = section.attention_head_dim or section.hidden_size // section.attention_heads
    reads = torch.stack([read_by_token(row, p, config) for row in x.unbind(1)], 1)
    scale = config.alpha / config.rank
    by_group = (x @ layer.linear_qkv.weight.t()).unflatten(-1, (section.attention_groups, -1, size))
    q, k, v = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
    q = q + scale * (reads @ p["delta_q_proj"].t()).unflatten(-1, (-1, size))
    if section.qk_norm:
        q, k = (
            y * torch.rsqrt(y.square().mean(-1, keepdim=True) + section.norm_eps) * norm.weight
            for y, norm in ((q, layer.q_layernorm), (k, layer.k_layernorm))
        )
    q, k = rotate(q, inverse), rotate(k, inverse)
    k, v = (y.repeat_interleave(section.attention_heads // section.attention_groups, 2) for y in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / size**0.5
    scores = scores.masked_fill(~torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(), -torch.inf)
    out = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v).flatten(2) @ layer.linear_proj.weight.t()
    change = scale * reads @ p["delta_o_proj"].t()
    if config.max_output_ratio:
        over = change.norm(dim=-1, keepdim=True) / (config.max_output_ratio * out.norm(dim=-1, keepdim=True))
        assert 0.1 < (over > 1).double().mean() < 0.9  # both kinds of tokens
        change = change / over.clamp(min=1)
    return out + change


@pytest.mark.parametrize(
    ("section", "config"), [(SECTION, TSW), (NORMED, MSW), (SECTION, BOUNDED)], ids=["TSW", "MSW, q-norm", "bounded"]
)
def test_a_layer_is_the_papers(section: ModelSection, config: DeltaMemConfig) -> None:
    model = build(section, config)
    layer, inverse = memory_layers(model)[1], model.rotary_pos_emb.inv_freq
    x, cotangent = drawn(S, B, 32).requires_grad_(), drawn(S, B, 32, seed=9)
    found = []
    for run in (
        lambda: layer(x, None, rotary_pos_emb=model.rotary_pos_emb(S))[0],
        lambda: attention_by_hand(x, layer, section, inverse),
    ):
        out = run()
        found.append({"output": out.detach()} | gradients_of(out, layer, x, cotangent))
    check(errors(*found), 1e-10)


def gradients_of(out: Tensor, module: torch.nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters()) | {"x": x}
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), cotangent), strict=True))


# ---- where it must be silent


def test_first_token_after_a_reset_is_the_backbones_bit_for_bit() -> None:
    ids, _ = tokens()
    plain = build(NORMED, None)
    packed = packed_sequence(ends(9), S)
    want = plain(ids, None, None, packed_seq_params=packed)
    model = build(NORMED, dataclasses.replace(MSW, output_init="random"))
    call = MemoryCall(MemoryInputs(reset=flags(0, 9)))
    for got in (model(ids, None, None, packed_seq_params=with_memory(call, S, ends(9))),
                model(ids, None, None, packed_seq_params=packed)):  # fmt: skip
        assert torch.equal(got[:, [0, 9]], want[:, [0, 9]])
        assert ((got[:, 1:9] - want[:, 1:9]).abs().amax(-1) > 1e-6).all()
    call = MemoryCall(MemoryInputs(reset=flags(0)))
    went_on = model(ids, None, None, packed_seq_params=with_memory(call, S, ends(9)))
    assert not torch.equal(went_on[:, 9], want[:, 9])


def test_zero_heads_change_no_bit_and_learn_first() -> None:
    ids, _ = tokens()
    want = build(NORMED, None, perturbed=False)(ids, None, None)
    model = build(NORMED, dataclasses.replace(TSW, output_init="zero"), perturbed=False)
    freeze_backbone(model)
    got = model(ids, None, None)
    assert torch.equal(got, want)
    got.backward(drawn(*got.shape))
    moved = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"delta_q_proj", "delta_o_proj"}


def test_scale_zero_is_the_backbone_and_states_are_kept_out_of_the_modules() -> None:
    ids, _ = tokens()
    model = build(SECTION, TSW)
    calls = [MemoryCall(control=MemoryControl(scale=0.0)), MemoryCall(control=MemoryControl(scale=0.0, freeze=True))]
    for call in calls:
        got = model(ids, None, None, packed_seq_params=with_memory(call, S))
        assert torch.equal(got, build(SECTION, None)(ids, None, None))
    written, off = (call.states_out() for call in calls)
    assert written and not off  # the second pass scans nothing
    held = MemoryCall(states=written, control=MemoryControl(scale=0.0, freeze=True))  # frozen, and passed on
    model(ids, None, None, packed_seq_params=with_memory(held, S))
    assert all(torch.equal(held.states_out()[layer].S, state.S) for layer, state in written.items())
    first = model(ids, None, None)
    assert torch.equal(model(ids, None, None), first)
    assert not [name for name, _ in model.named_buffers() if "delta_mem" in name]


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_other_documents_leave_no_trace(name: str) -> None:
    section, config = VARIANTS[name]
    model = build(section, config).eval()
    ids, message = tokens()
    valid = ~flags(*range(6), *range(20, S))  # padding before and after; attention is cut there too
    logits, states = [], []
    for pad in (0, 7):
        filled = torch.where(valid, ids, pad)
        call = MemoryCall(MemoryInputs(valid=valid, reset=flags(0, 13), message=message))
        logits.append(model(filled, None, None, packed_seq_params=with_memory(call, S, ends(6, 13, 20))))
        states.append(call.states_out())
    assert torch.equal(logits[0][valid], logits[1][valid])
    assert all(torch.equal(states[0][layer].S, states[1][layer].S) for layer in states[0])
    call = MemoryCall(MemoryInputs(message=message[:, 13:20]))
    alone = model(ids[:, 13:20], None, None, packed_seq_params=with_memory(call, 7))
    torch.testing.assert_close(logits[0][:, 13:20], alone, rtol=1e-9, atol=1e-9)
    for layer, state in call.states_out().items():
        # by message, the last one was over at the first padding token no earlier than at the next valid one
        torch.testing.assert_close(states[0][layer].S, state.S, rtol=1e-9, atol=1e-12)


# ---- packed rows


WRITE = 15


@pytest.mark.parametrize("both_write", [False, True], ids=["write, read", "cut anywhere"])
@pytest.mark.parametrize("name", VARIANTS)
def test_one_packed_pass_is_two_passes(name: str, both_write: bool) -> None:
    """[write | read] in one row, places not restarted, equals two passes with the state between: all gradients."""
    section, config = VARIANTS[name]
    model = build(section, config)
    ids, message = tokens()
    cotangent = drawn(B, S, model.output_layer.weight.shape[0])
    cotangent[:, :WRITE] *= both_write
    write = torch.ones(B, S, dtype=torch.bool)
    write[:, WRITE:] = both_write
    call = MemoryCall(MemoryInputs(reset=flags(0), write=write, message=message))
    packed = model(ids, None, None, packed_seq_params=with_memory(call, S, ends(WRITE)))
    packed.backward(cotangent)
    want = gradients(model) | {"logits": packed.detach()} | {
        f"state {layer}": state.S.detach() for layer, state in call.states_out().items()
    }  # fmt: skip
    model.zero_grad()
    parts, states = [], None
    for part in (slice(0, WRITE), slice(WRITE, S)):
        call = MemoryCall(MemoryInputs(write=write[:, part], message=message[:, part]), states=states)
        parts.append(model(ids[:, part], None, None, packed_seq_params=with_memory(call, part.stop - part.start)))
        states = call.states_out()
    two = torch.cat(parts, 1)
    two.backward(cotangent)
    got = gradients(model) | {"logits": two.detach()}
    check(errors(got | {f"state {layer}": state.S.detach() for layer, state in states.items()}, want), 1e-9)


# ---- training


@pytest.mark.parametrize("name", ["TSW", "MSW, q-norm", "SSW"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_gradient_of_a_frozen_backbone(name: str, how: str) -> None:
    section, config = VARIANTS[name]
    ids, message = tokens()
    write, found = ~flags(*range(WRITE, S)), []
    for recompute in ("none", how):
        model = build(section, config, recompute).train()
        names = freeze_backbone(model)
        call = MemoryCall(MemoryInputs(reset=flags(0), write=write, message=message), gate_weight=30.0)
        logits = model(ids, None, None, packed_seq_params=with_memory(call, S, ends(WRITE)))
        gates = [result.gate.clone() for result in call.results.values()]
        loss = call.penalise((logits * drawn(*logits.shape)).sum())
        (loss * 3).backward()
        assert gates == [result.gate for result in call.results.values()]
        grads = gradients(model)
        assert sorted(grads) == sorted(names)  # the adapter's, all of them, and nothing else
        assert all(result.state.S.requires_grad == (recompute != "full") for result in call.results.values())
        found.append(grads | {"loss": loss.detach()})
    check(errors(found[1], found[0]), 1e-12)


def test_a_bf16_backbone_keeps_an_fp32_memory() -> None:
    ids, _ = tokens()
    states = []
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model, call = build(NORMED, MSW, dtype=dtype), MemoryCall()
        names = freeze_backbone(model)
        logits = model(ids, None, None, packed_seq_params=with_memory(call, S))
        assert logits.dtype == dtype
        logits.backward(drawn(*logits.shape).to(dtype))
        trained = [model.get_parameter(name) for name in names]
        assert {p.dtype for p in trained} == {call.results[0].state.S.dtype} == {kept}
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained)
        states.append(call.results[0].state.S.detach().double())
    torch.testing.assert_close(*states, rtol=0.05, atol=0.01)
    assert states[1].abs().max() > 0.1


def test_gate_penalty_has_the_gradient_of_its_value() -> None:
    model = build(SECTION, TSW)
    freeze_backbone(model)
    ids, _ = tokens()
    written = ~flags(3, 4)

    def run(weight: float) -> tuple[MemoryCall, Tensor]:
        call = MemoryCall(MemoryInputs(write=written), gate_weight=weight)
        return call, model(ids, None, None, packed_seq_params=with_memory(call, S)).sum()

    grads = []
    for weight in (0.0, 2.0):
        call, loss = run(weight)
        model.zero_grad()
        (call.penalise(loss) * 5).backward()
        grads.append({name: g.clone() for name, g in gradients(model).items()})
    assert call.penalty() == 2 * torch.stack([(r.gate - 0.05) ** 2 for r in call.results.values()]).mean()
    step = 1e-5
    for leaf in ("0.self_attention.delta_mem.beta_bias", "0.self_attention.delta_mem.delta_o_proj",
                 "1.self_attention.delta_mem.beta_proj", "0.self_attention.delta_mem.memory_v_proj"):  # fmt: skip
        name = f"decoder.layers.{leaf}"
        entry, values = model.get_parameter(name).data.view(-1)[2:3], []
        for change in (step, -2 * step):
            entry += change
            values.append(run(2.0)[0].penalty())
        entry += step
        want = 5 * (values[0] - values[1]) / (2 * step)
        got = (grads[1][name] - grads[0][name]).flatten()[2]
        assert abs(want) > 1e-6
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-10)


def test_steering_starts_along_the_base_weights() -> None:
    model = build(NORMED, TSW, perturbed=False)
    for layer in memory_layers(model):
        by_group = layer.linear_qkv.weight.detach().unflatten(0, (NORMED.attention_groups, -1, 10))
        query = by_group[:, :-2].flatten(0, 2)
        for start, base in (
            (layer.delta_mem.delta_q_proj, query),
            (layer.delta_mem.delta_o_proj, layer.linear_proj.weight),
        ):
            want = 0.05 * base[:, :8] / base[:, :8].norm(dim=0)
            torch.testing.assert_close(start, want, rtol=1e-6, atol=1e-8)
    drawn_starts = [layer.delta_mem.memory_q_proj for layer in memory_layers(model)]
    assert not torch.equal(*drawn_starts)


def test_parameters_of_qwen3_4b(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = ModelSection(hidden_size=2560, num_layers=1, pattern="A", attention_heads=32, attention_groups=8,
                        attention_head_dim=128, qk_norm=True, ffn_hidden_size=16)  # fmt: skip
    initialize_distributed("cpu")
    lay_out(1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config = transformer_config(qwen, ParallelSection(), torch.float32, False)
    for memory, want in ((TSW, 4_866_336), (DeltaMemConfig(num_states=4), 19_465_344)):
        spec = add_memories(block_spec(qwen), memory).layer_specs[0]
        layer = build_module(spec, config=config, layer_number=1, pg_collection=process_groups())
        assert 36 * sum(layer.get_parameter(name).numel() for name in freeze_backbone(layer)) == want


def test_what_a_pass_reports_of_the_steering_leaves_out_padding() -> None:
    model = build(SECTION, TSW)
    ids, _ = tokens()
    outputs: dict[str, Tensor] = {}
    layer = memory_layers(model)[0]
    layer.linear_proj.register_forward_hook(lambda module, args, out: outputs.update(base=out[0].detach()))
    layer.register_forward_hook(lambda module, args, out: outputs.update(steered=out[0].detach()))
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[:, S // 2 :] = False
    call = MemoryCall(MemoryInputs(valid=valid), measure=True)
    model(ids, None, None, packed_seq_params=with_memory(call, S))
    base, steered = (outputs[name][: S // 2] for name in ("base", "steered"))  # [S, B, hidden]
    torch.testing.assert_close(call.results[0].steering, ((steered - base).norm() / base.norm()).float())


@pytest.mark.parametrize(
    "config",
    [
        TSW,
        DeltaMemConfig(couple_lambda=False, lambda_bias=4.0),
        DeltaMemConfig(update="no_lambda"),
        DeltaMemConfig(memory="static"),
    ],
    ids=["coupled", "own keep gate", "no keep gate", "no writes"],
)
def test_half_life_is_the_keep_gates(config: DeltaMemConfig) -> None:
    model = build(SECTION, config)
    ids, _ = tokens()
    call = MemoryCall()
    model(ids, None, None, packed_seq_params=with_memory(call, S))
    result, memory = call.results[0], memory_layers(model)[0].delta_mem
    if config.memory == "static" or config.update == "no_lambda":
        assert result.keep == 1 and half_life(result.keep.item()) == math.inf
        return
    if config.couple_lambda:
        assert result.keep.item() == pytest.approx(1 - result.gate.item())
    else:
        assert abs(result.keep - torch.sigmoid(memory.lambda_bias).mean()) < 0.05 < abs(result.keep - 1 + result.gate)
    assert result.keep.item() ** half_life(result.keep.item()) == pytest.approx(0.5)


def test_what_a_pass_reports() -> None:
    model = build(SECTION, TSW)
    ids, _ = tokens()
    outputs: dict[str, Tensor] = {}
    layer = memory_layers(model)[0]
    layer.linear_proj.register_forward_hook(lambda module, args, out: outputs.update(base=out[0].detach()))
    layer.register_forward_hook(lambda module, args, out: outputs.update(steered=out[0].detach()))
    call = MemoryCall(MemoryInputs(write=~flags(2)), measure=True)
    model(ids, None, None, packed_seq_params=with_memory(call, S))
    result = call.results[0]
    want = (outputs["steered"] - outputs["base"]).norm() / outputs["base"].norm()
    torch.testing.assert_close(result.steering, want.float())
    assert result.writes == B * (S - 1) and 0.1 < result.gate < 0.3 and want > 1e-3


# ---- what is refused


def refused_reuse(model) -> None:
    call = MemoryCall()
    for _ in range(2):
        model(tokens()[0], None, None, packed_seq_params=with_memory(call, S))


def refused_state(model) -> None:
    model.config.recompute_granularity = "full"
    start = MemoryState(torch.zeros(B, 1, 8, 8, dtype=torch.float64, requires_grad=True))
    memory_layers(model)[0](drawn(S, B, 32), None, packed_seq_params=with_memory(MemoryCall(states={0: start}), S))


def refused_decoding(model) -> None:
    memory_layers(model)[0](drawn(S, B, 32), None, inference_context=object())


@pytest.mark.parametrize(
    ("run", "words"),
    [(refused_reuse, "one forward pass"), (refused_state, "recompute=selective"), (refused_decoding, "export")],
)
def test_misuse_is_refused(run: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(build(SECTION, TSW).train())


@pytest.mark.parametrize(
    ("pattern", "layers", "words"),
    [
        ("DA", (0,), "layer 0 is not a softmax"),
        ("A", (1, 2), "layer 2 is not a softmax"),
        ("D", None, "no softmax"),
    ],
)
def test_layers_that_cannot_carry_a_memory_are_named(pattern: str, layers: tuple | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(dataclasses.replace(BASE_SECTION, pattern=pattern), DeltaMemConfig(layers_to_transform=layers))


def test_only_the_chosen_layers_carry_a_memory() -> None:
    for section, config, want in (
        (SECTION, DeltaMemConfig(layers_to_transform=(1,)), [1]),
        (SECTION, TSW, [0, 1]), (VARIANTS["TSW, hybrid"][0], TSW, [1]),
    ):  # fmt: skip
        model = build(section, config)
        assert [layer.layer for layer in memory_layers(model)] == want
        ids, _ = tokens()
        call = MemoryCall()
        model(ids, None, None, packed_seq_params=with_memory(call, S))
        assert sorted(call.results) == want
