"""What transformers, Trainer and PEFT ask of a model, on every release that is admitted."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import DynamicCache

from megatron_dla.errors import UserError
from megatron_dla.hf import releases
from megatron_dla.hf.load import load_export, load_export_tokenizer

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests/fixtures/62bb8a7/export"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_of(out):
    """Under the name that this release has."""
    return out.cache if "cache" in out else out.past_key_values


@pytest.fixture(scope="module", params=["mamba2", "gdn_hybrid"])
def model(exported, request):
    return exported(request.param).load()


def test_the_releases_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = next(x for x in project["optional-dependencies"]["train"] if x.startswith("transformers"))
    specifier = SpecifierSet(wanted.removeprefix("transformers"))
    order = [Version(x) for x in (releases.MINIMUM, releases.PINNED, releases.NEWEST)]
    assert order == sorted(order) and all(x in specifier for x in order)
    assert not specifier.contains(f"{order[0].major}.{order[0].minor - 1}")
    assert f"transformers=={releases.PINNED}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("found", "old"), [("4.57.1", True), ("5.16.1", True), ("5.17.0", False), ("6.0.0.dev0", False)]
)
def test_an_old_release_is_named(found, old) -> None:
    if not old:
        releases.check_release(found)
        return
    with pytest.raises(ImportError, match=rf"transformers {found} .*>={releases.MINIMUM}"):
        releases.check_release(found)


def test_the_export_says_what_it_was_tested_on(exported) -> None:
    assert releases.tested_range() in (exported("mamba2").directory / "README.md").read_text()


@torch.no_grad()
def test_both_names_of_the_cache(model) -> None:
    ids = tokens(2, 30)
    full = model(ids, use_cache=False).logits
    for name in ("past_key_values", "cache"):
        memory = cache_of(model(ids[:, :20], use_cache=True))
        out = model(ids[:, 20:], **{name: memory})
        assert cache_of(out) is memory
        torch.testing.assert_close(out.logits, full[:, 20:], rtol=0, atol=2e-5)
        assert cache_of(model.model(ids[:, :1], **{name: memory})) is memory
    with pytest.raises(ValueError, match="past_key_values and cache"):
        model(ids[:, 20:], past_key_values=memory, cache=memory.clone())
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, cache=DynamicCache())


@torch.no_grad()
def test_what_peft_and_trainer_pass(model) -> None:
    ids = tokens(2, 20)
    nothing = dict.fromkeys(["inputs_embeds", "output_attentions", "output_hidden_states", "return_dict"])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **nothing)
    want = model(ids, labels=ids)
    assert torch.equal(out.logits, want.logits) and torch.equal(out.loss, want.loss)
    types = model(ids, token_type_ids=torch.zeros_like(ids), position_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(types, out.logits, rtol=0, atol=0)
    assert isinstance(model(ids, return_dict=False), tuple)
    for call in (lambda: model(ids, output_attentions=True), lambda: model.model(ids, output_attentions=True)):
        with pytest.raises(ValueError, match="output_attentions"):
            call()
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)


@torch.no_grad()
def test_the_loss_over_all_items_of_a_batch(model) -> None:
    """Trainer with gradient accumulation hands over the number of labels of all micro-batches."""
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[0, :7] = -100
    mean = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=items).loss, mean)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=4 * items).loss, mean / 4)
    assert model.accepts_loss_kwargs
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, mean)


@torch.no_grad()
def test_labels_with_logits_to_keep(model) -> None:
    ids = tokens(2, 20)
    last = model(ids, labels=ids[:, -5:], logits_to_keep=5)
    want = model(ids).logits[:, -5:-1].flatten(0, 1)
    torch.testing.assert_close(last.loss, torch.nn.functional.cross_entropy(want, ids[:, -4:].flatten()))
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=5)


def test_evaluation_ignores_the_cache(model) -> None:
    assert set(model.config.keys_to_ignore_at_inference) == {"past_key_values", "cache"}


@pytest.mark.parametrize("size", [1, 7, 64])
def test_prefill_in_chunks(model, size) -> None:
    ids = tokens(2, 30)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **GREEDY), model.generate(ids, **GREEDY))


def test_stop_strings(model, exported) -> None:
    tok, ids = load_export_tokenizer(exported("mamba2").directory), tokens(1, 9)
    options = GREEDY | {"max_new_tokens": 60}
    free = model.generate(ids, **options)
    stop = next(x for x in map(tok.decode, free[0, 12:]) if x.isascii() and x.isalnum())
    got = model.generate(ids, tokenizer=tok, stop_strings=[stop], **options)
    assert got.shape[1] < free.shape[1] and tok.decode(got[0, -1]).endswith(stop)
    assert torch.equal(got, free[:, : got.shape[1]])


def test_an_old_export_generates_with_the_code_of_this_version(tmp_path) -> None:
    """Its own code knows no release after 5.23; the loader leaves its files alone."""
    shutil.copytree(OLD, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    old = load_export(tmp_path / "old")
    assert old.generate(tokens(1, 9) % 250, **GREEDY).shape == (1, 17)
    assert old.config.name_or_path == str(tmp_path / "old") and "cache" in old.config.keys_to_ignore_at_inference
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}


def test_a_cache_of_modules_that_cannot_be_written(exported, monkeypatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", "/proc/nope")
    with pytest.raises(UserError, match="HF_MODULES_CACHE = '/proc/nope'"):
        load_export(exported("mamba2").directory)
    assert json.loads((exported("mamba2").directory / "config.json").read_text())["model_type"] == "dla"
