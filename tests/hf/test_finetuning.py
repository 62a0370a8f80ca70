"""Fine-tuning an export: packed rows, gradient checkpointing, autocast, padded batches, a classifier."""

import sys
from functools import cache

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megatron_dla.kernels.dla import partition
from tests.hf.test_protocol import cache_of, tokens
from tests.support.exports import CASES

LENGTHS = [1, 23, 40, 6]


@pytest.fixture(scope="module")
def model_of(exported):
    return cache(lambda name: exported(name).load().double())


@pytest.fixture
def layers(model_of):
    """The module that holds the layers of the exported models."""
    return lambda model: sys.modules[type(model.model.layers[0]).__module__]


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def packed() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Documents [1, n], the packed row [1, T], its position_ids and its cu_seq_lens."""
    rows = [tokens(1, n, seed=n) for n in LENGTHS]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return rows, torch.cat(rows, 1), torch.cat([torch.arange(n) for n in LENGTHS])[None], ends


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
def test_packed_rows_are_separate_rows(model_of, name, given) -> None:
    """DataCollatorWithFlattening and TRL's packing give position_ids, with flash attention's borders or without."""
    model = model_of(name)
    rows, ids, positions, ends = packed()
    inputs = {"position_ids": positions}
    if given == "cu_seq_lens":
        inputs = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    with torch.no_grad():
        out = model(ids, **inputs)
        want = torch.cat([model(row).logits for row in rows], 1)
    torch.testing.assert_close(out.logits, want, rtol=0, atol=1e-10)
    assert cache_of(out) is None  # in eval mode, too: a cache has no documents
    with torch.no_grad():
        two = torch.cat([ids, ids])
        both = model(two, position_ids=positions.expand(2, -1)).logits if given == "position_ids" else None
    if both is not None:
        torch.testing.assert_close(both, want.expand(2, -1, -1), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True, **inputs)


def test_packed_rows_train_as_separate_rows(model_of) -> None:
    model = model_of("gdn_hybrid")
    rows, ids, positions, _ = packed()
    labels = ids.masked_fill(positions == 0, -100)
    items = (labels != -100).sum()
    got = gradients(model, input_ids=ids, labels=labels, position_ids=positions, num_items_in_batch=items)
    want = {name: torch.zeros_like(x) for name, x in got.items()}
    for row in rows[1:]:
        for name, x in gradients(model, input_ids=row, labels=row, num_items_in_batch=items).items():
            want[name] += x
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-5, atol=1e-7)  # transformers takes the loss in fp32


def test_packed_rows_with_padding_on_the_left(model_of) -> None:
    model = model_of("gdn_hybrid")
    rows, ids, positions, _ = packed()
    pad = torch.zeros(1, 9, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(ids)], 1)
    with torch.no_grad():
        out = model(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=torch.cat([pad, positions], 1))
        want = torch.cat([model(row).logits for row in rows], 1)
    torch.testing.assert_close(out.logits[:, 9:], want, rtol=0, atol=1e-10)


def test_positions_that_go_on_are_one_document(model_of) -> None:
    """generate() passes position_ids: in a padded batch, and after a cache."""
    model, ids = model_of("gdn_hybrid"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        out = model(ids, attention_mask=mask, position_ids=positions)
        assert torch.equal(out.logits, want) and cache_of(out) is not None
        memory = cache_of(model(ids[:, :12], use_cache=True))
        rest = model(ids[:, 12:], past_key_values=memory, position_ids=torch.arange(12, 20)[None]).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 12:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_left_padded_rows_train_as_rows_alone(model_of, name) -> None:
    model, ids = model_of(name), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    model.train()
    try:
        items = torch.tensor(45)
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, 13] = -100
        got = gradients(model, input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=items)
        one = gradients(model, input_ids=ids[:1], labels=ids[:1], num_items_in_batch=items)
        two = gradients(model, input_ids=ids[1:, 13:], labels=ids[1:, 13:], num_items_in_batch=items)
    finally:
        model.eval()
    for key, x in got.items():
        torch.testing.assert_close(x, one[key] + two[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mamba2", "mamba2_hybrid", "gdn_hybrid"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(exported, layers, monkeypatch, name, reentrant) -> None:
    model = exported(name).load().train()
    ids = tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    want = gradients(model, **inputs)
    module, calls = layers(model), []
    monkeypatch.setattr(module, "partition", lambda *a, **b: calls.append(1) or partition(*a, **b))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, **inputs)
    assert len(calls) == model.config.layer_letters.count("D")  # the recomputation follows the decisions of the pass
    assert all(torch.equal(got[key], x) for key, x in want.items())
    assert cache_of(model(ids, use_cache=True)) is None
    memory = cache_of(model.eval()(ids))
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(ids[:, :1], past_key_values=memory)
    assert model.eval().generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (2, 72)


@pytest.mark.parametrize("name", CASES)
def test_autocast(exported, layers, monkeypatch, name) -> None:
    """Trainer's bf16=True: fp32 weights, a bf16 forward pass, backward outside of it."""
    model, ids = exported(name).load().train(), tokens(2, 70)
    decided: list = []

    def record(*args, **kwargs):
        found = partition(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            again = partition(*args, **kwargs)
        assert torch.equal(found.start, again.start) and torch.equal(found.score, again.score)
        decided.append(found)
        return found

    monkeypatch.setattr(layers(model), "partition", record)
    want = gradients(model, input_ids=ids, labels=ids)
    forced = decided.copy()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids, labels=ids).logits.dtype == torch.bfloat16
    if model.config.layer_letters[0] == "D":  # nothing before its decisions is bf16
        assert torch.equal(decided[len(forced)].score, decided[0].score)
    # gradients of the same function: under the decisions of the fp32 pass
    monkeypatch.setattr(layers(model), "partition", lambda *a, **b: forced.pop(0))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    got = {key: x.grad for key, x in model.named_parameters()}
    difference, norm = (
        torch.stack([x.norm() for x in xs]).norm() for xs in ([got[k] - x for k, x in want.items()], want.values())
    )
    assert difference < 0.03 * norm
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("name", ["mamba2", "gdn_hybrid"])
def test_backward_and_generation_inside_autocast(exported, name) -> None:
    model, ids = exported(name).load().train(), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval().generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 43)


def test_a_classifier_reads_the_last_token(exported) -> None:
    directory = exported("gdn_hybrid").directory
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3, trust_remote_code=True).eval()
    ids, pad = tokens(2, 20), model.config.pad_token_id
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = pad, 0
    out = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3) and out.loss.isfinite() and not model.accepts_loss_kwargs
    with torch.no_grad():
        torch.testing.assert_close(out.logits[1:], model(ids[1:, 6:]).logits, rtol=0, atol=1e-5)
    out.loss.backward()
    assert model.score.weight.grad.norm() > 0 and model.model.embed_tokens.weight.grad.norm() > 0


def test_accelerate_can_move_what_layers_share(exported, layers) -> None:
    model, ids = exported("gdn_hybrid").load(), tokens(2, 20)
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    model(ids, attention_mask=mask, use_cache=False)
    hook.remove()
    moved = seen[0].to("meta", non_blocking=True)
    tensors = [moved.padding, moved.real, *moved.rotary, moved.mask, moved.ends]
    assert type(moved) is layers(model).Step and all(x.device.type == "meta" for x in tensors)
