"""The exported model computes what Megatron computes, with and without a cache, and generates."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_dla.checkpoint.weights import parameter_tags
from megatron_dla.config import LETTERS
from megatron_dla.hf import mapping
from megatron_dla.hf.convert import to_hf
from megatron_dla.hf.load import load_export
from megatron_dla.hf.verify import decode_logits, megatron_logits
from megatron_dla.mixers.layout import FP32_PARAMETERS
from tests.support.exports import RECURRENT


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model_of(exported):
    return cache(lambda name: exported(name).load())


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("length", [1, 100])
def test_logits_are_megatrons(exported, model_of, name, length):
    ids = tokens(2, length)
    with torch.no_grad():
        got = model_of(name)(ids).logits
    want = megatron_logits(exported(name).megatron, ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RECURRENT)
def test_same_function_in_float64(exported, name):
    """No rounding to hide behind: Megatron, one pass, and prefill + decode agree to 1e-10."""
    ids = tokens(2, 100)
    model, reference = exported(name).load().double(), exported(name).megatron.double()
    with torch.no_grad():
        full = model(ids).logits
        want = reference(ids, torch.arange(100).expand_as(ids), None)
    reference.float()  # nothing is lost on the way to float64 and back
    assert full.dtype == want.dtype == torch.float64
    torch.testing.assert_close(full, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(decode_logits(model, ids, 33), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mamba2_hybrid", "gdn_hybrid"])  # a letter may fix the backbone
@pytest.mark.parametrize("letter", LETTERS)
def test_every_letter_of_the_pattern(exported, saved, tmp_path, letter, name):
    """Export, one pass and decoding of a model with that mixer, also of one that was added without tests of its own."""
    section = replace(exported(name).section, pattern=letter)
    megatron, step = saved(section, tmp_path / "run")
    assert parameter_tags(megatron) == mapping.parameter_tags(section)
    model, ids = load_export(to_hf(step, tmp_path / f"hf_letter_{letter}")).double(), tokens(2, 60)
    with torch.no_grad():
        want = megatron.double()(ids, torch.arange(60).expand_as(ids), None)
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(decode_logits(model, ids, 33), want, rtol=0, atol=1e-10)


CONTROLS = {
    "random": dict(boundary="random", boundary_rate=0.3, merge="random", control_seed=11),
    "every": dict(boundary="every", boundary_every=3, merge="equal_counts", slot_weights="content"),
    "oldest": dict(merge="oldest", tau_mode="calibrated"),
    "ward": dict(merge="ward"),
}


@pytest.mark.parametrize("rule", CONTROLS)
def test_every_rule_of_boundaries_and_merges(exported, saved, tmp_path, rule):
    section = replace(exported("mamba2" if rule == "random" else "gdn").section, **CONTROLS[rule])
    megatron, step = saved(section, tmp_path / "run")
    mixer = megatron.decoder.layers[0].self_attention
    assert section.slot_weights == "recency" or mixer.sharpness.abs().max() > 0.01
    model, ids = load_export(to_hf(step, tmp_path / f"hf_rule_{rule}")).double(), tokens(2, 60)
    with torch.no_grad():
        want = megatron.double()(ids, torch.arange(60).expand_as(ids), None)
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(decode_logits(model, ids, 33), want, rtol=0, atol=1e-10)
    mixer.model.merge = "density"  # the test says nothing where no slots merge
    with torch.no_grad():
        other = megatron(ids, torch.arange(60).expand_as(ids), None)
    assert (other - want).abs().max() > 1e-6


@pytest.mark.parametrize("name", RECURRENT)
def test_prefill_and_decode_match_one_pass(model_of, name):
    model, ids = model_of(name), tokens(2, 90)
    with torch.no_grad():
        full = model(ids, use_cache=False)
        assert full.past_key_values is None
        memory = model(ids[:, :70], use_cache=True).past_key_values
        # the test says nothing where a head has one slot only, or never merges
        assert any(layer.slots is not None and layer.slots.live.max() == 4 for layer in memory.layers)
        rest = model(ids[:, 70:], past_key_values=memory.clone()).logits
    torch.testing.assert_close(rest, full.logits[:, 70:], rtol=0, atol=2e-5)
    torch.testing.assert_close(decode_logits(model, ids, 2), full.logits, rtol=0, atol=2e-5)
    assert memory.get_seq_length() == 70


@pytest.mark.parametrize("name", RECURRENT)
def test_greedy_generation_is_greedy(model_of, name):
    model, ids = model_of(name), tokens(2, 9, seed=1)
    got = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    want = ids
    for _ in range(12):
        with torch.no_grad():
            logits = model(want, use_cache=False).logits[:, -1]
        logits[:, 300:] = -torch.inf  # rows that no token uses: generation_config.json suppresses them
        want = torch.cat([want, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mamba2", "gdn_hybrid"])
def test_left_padding_leaves_no_trace(model_of, name):
    model, ids = model_of(name), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    with torch.no_grad():
        alone = model(ids[1:, 13:], use_cache=True)
        batch = model(ids, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(batch.logits[1:, 13:], alone.logits, rtol=0, atol=2e-5)
        new = tokens(2, 1, seed=3)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        one = model(new[1:], past_key_values=alone.past_key_values).logits
        two = model(new, attention_mask=mask, past_key_values=batch.past_key_values).logits
    torch.testing.assert_close(two[1:], one, rtol=0, atol=2e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    both = model.generate(ids, attention_mask=mask[:, :-1], **options)
    assert torch.equal(both[1, 40:], model.generate(ids[1:, 13:], **options)[0, 27:])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_batch_of_different_padding_is_each_row_alone(exported, name):
    """In float64: the rows run as one batch, take the decisions of each row alone, and go on from its memory."""
    model, ids, skips = exported(name).load().double(), tokens(4, 90, seed=4), [0, 7, 45, 79]
    mask = (torch.arange(90) >= torch.tensor(skips)[:, None]).long()
    with torch.no_grad():
        batch = model(ids[:, :80], attention_mask=mask[:, :80], use_cache=True)
        memory = batch.past_key_values
        later = [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=memory) for t in (80, 81)]
        later.append(model(ids[:, 82:], attention_mask=mask, past_key_values=memory))
    got = torch.cat([batch.logits, *(out.logits for out in later)], 1)
    slots = [layer.slots for layer in memory.layers if layer.slots is not None]
    assert slots[0].live[:3].max() == slots[0].capacity  # else nothing merged
    for row, skip in enumerate(skips):
        with torch.no_grad():
            alone = model(ids[row : row + 1, skip:], use_cache=True)
        torch.testing.assert_close(got[row : row + 1, skip:], alone.logits, rtol=0, atol=1e-10)
        for mine, layer in zip(
            slots, (x.slots for x in alone.past_key_values.layers if x.slots is not None), strict=True
        ):
            used = torch.arange(mine.capacity) < layer.live[..., None]
            assert torch.equal(mine.live[row], layer.live[0])
            assert torch.equal(mine.start[row][used[0]], layer.start[used] + skip)
            assert torch.equal(mine.count[row][used[0]], layer.count[used])
            torch.testing.assert_close(mine.states[row], layer.states[0], rtol=0, atol=1e-10)


def test_masks_that_a_recurrence_cannot_follow(model_of):
    model, ids = model_of("mamba2"), tokens(2, 10)
    right = torch.ones_like(ids)
    right[0, 7:] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=right).logits[:1, :7]
        torch.testing.assert_close(got, model(ids[:1, :7]).logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="Pad on the left"):
            model(ids, attention_mask=right, use_cache=True)
        hole = torch.ones_like(ids)
        hole[0, 4] = 0
        with pytest.raises(ValueError, match="hole"):
            model(ids, attention_mask=hole)
        with pytest.raises(ValueError, match="whole row"):
            model(ids, attention_mask=torch.zeros_like(ids))
        memory = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="every token must be real"):
            model(ids[:, :1], attention_mask=torch.zeros(2, 11), past_key_values=memory)
        with pytest.raises(ValueError, match="the cache holds 2 sequences"):
            model(ids[:1], past_key_values=memory)


@pytest.mark.parametrize("name", ["mamba2", "gdn_hybrid"])
def test_a_decode_step_compiles_into_one_graph(model_of, name):
    """With the mask of a padded batch; the second graph, of a length that varies, serves every later step."""
    model, ids, mask = model_of(name), tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :7] = 0
    torch.compiler.reset()
    with torch.no_grad():
        memory = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
        plain = memory.clone()
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for t in range(30, 40):
            now = {"input_ids": ids[:, t : t + 1], "attention_mask": mask[:, : t + 1].contiguous()}
            got, want = step(**now, past_key_values=memory).logits, model(**now, past_key_values=plain).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert graphs["unique_graphs"] - before <= 2 and memory.seen == 40
        mask[0, -1] = 0
        with pytest.raises(RuntimeError, match="every token must be real"):
            step(input_ids=ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=memory)


@pytest.mark.parametrize("name", ["mamba2", "gdn_hybrid"])
def test_beam_search_moves_the_cache(model_of, name):
    model, ids = model_of(name), tokens(2, 6, seed=2)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with_cache, without = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_sampling_and_refusals(model_of):
    model, ids = model_of("mamba2"), tokens(2, 6)
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=5.0, num_return_sequences=2)
    assert out.shape[0] == 4 and int(out.max()) < 300
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=4, prompt_lookup_num_tokens=2)
    memory = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(3)


def test_generation_continues_a_cache(model_of):
    model, ids = model_of("gdn_hybrid"), tokens(1, 30)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        memory = model(ids[:, :20], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=memory, **options), model.generate(ids, **options))


@pytest.mark.parametrize(("name", "grows"), [("mamba2", False), ("gdn", False), ("gdn_hybrid", True)])
def test_memory_of_the_cache(model_of, name, grows):
    model = model_of(name)
    with torch.no_grad():
        small, large = (model(tokens(1, n), use_cache=True).past_key_values.nbytes for n in (8, 200))
        memory = model(tokens(1, 8), use_cache=True).past_key_values
        for _ in range(3):
            memory = model(tokens(1, 1), past_key_values=memory).past_key_values
    assert (large > small, memory.nbytes > small) == (grows, grows)


@pytest.mark.parametrize("name", RECURRENT)
def test_bf16_keeps_the_fp32_parameters(exported, name):
    model = exported(name).load(dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        fp32 = key.rsplit(".", 1)[-1] in FP32_PARAMETERS
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), key
    ids = tokens(2, 70)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 73)


@pytest.mark.parametrize("name", RECURRENT)
def test_loss_and_gradients_from_scratch(exported, name):
    config = exported(name).load().config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    ids = tokens(2, 70)
    out = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)
    assert out.past_key_values is None
    out.loss.backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_save_and_reload(model_of, tmp_path):
    model, ids = model_of("gdn_hybrid"), tokens(1, 20)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_setting_changed_after_loading_counts(model_of, monkeypatch):
    model, ids = model_of("gdn"), tokens(1, 40)
    with torch.no_grad():
        before = model(ids).logits
        monkeypatch.setattr(model.config, "tau", 0.0)
        assert not torch.equal(model(ids).logits, before)


def test_an_engine_batches_rows_of_different_lengths(model_of):
    """`DLACache.lengths`, and keys that are kept elsewhere (`LayerMemory.attend`), without padding."""
    model, ids, lengths = model_of("mamba2_hybrid"), tokens(2, 40), [25, 9]
    alone = [model(ids[n : n + 1, :t], use_cache=True).past_key_values for n, t in enumerate(lengths)]
    rows, cache = [one.layers[0] for one in alone], type(alone[0])(2)

    def attend(q, k, v):
        outs = []
        for n, row in enumerate(rows):
            keys, values = torch.cat([row.keys, k[n : n + 1]], 2), torch.cat([row.values, v[n : n + 1]], 2)
            outs.append(F.scaled_dot_product_attention(q[n : n + 1], keys, values, enable_gqa=True))
        return torch.cat(outs)

    cache.layers[0].attend, cache.lengths = attend, torch.tensor(lengths)
    slots, tails = zip(*((one.layers[1].slots, one.layers[1].tail) for one in alone), strict=True)
    cache.layers[1].slots, cache.layers[1].tail = type(slots[0]).concatenate(list(slots)), torch.cat(tails)
    new = torch.tensor([[7], [8]])
    with torch.no_grad():
        got = model(new, past_key_values=cache).logits
        want = [model(new[n : n + 1], past_key_values=one).logits for n, one in enumerate(alone)]
    torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-5)
    for copy in (cache.clone, lambda: cache.batch_select_indices(torch.tensor([0]))):
        with pytest.raises(ValueError, match="kept by an engine"):
            copy()
