"""Trainer, TRL and PEFT with their defaults on exported models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

TEXT = "hello world"


@pytest.fixture(params=["mamba2", "gdn_hybrid"])
def directory(exported, request):
    return exported(request.param).directory


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


def load_tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


def sft(directory, out, **options):
    """TRL's own defaults (bf16, gradient checkpointing, no packing) but for the length of the run."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        str(out), max_steps=20, learning_rate=2e-2, report_to=[], save_strategy="no", use_cpu=True, **options
    )
    rows = Dataset.from_list([{"text": TEXT}] * 160)
    return SFTTrainer(load(directory), args=config, train_dataset=rows, processing_class=load_tokenizer(directory))


@pytest.mark.parametrize("packing", [False, True])
def test_sft_with_defaults_teaches_to_stop(directory, tmp_path, packing):
    trainer = sft(directory, tmp_path, packing=packing)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tok, model = load_tokenizer(tmp_path / "tuned"), load(tmp_path / "tuned").eval()
    out = model.generate(**tok("hello", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert tok.decode(out[0]) == TEXT + tok.eos_token


def batches(directory):
    tok, texts = load_tokenizer(directory), ("hello", "hello world the", "the quick brown fox", "world")
    return tok, [tok(text + tok.eos_token) for text in texts * 4]


def train(directory, out, **options):
    """Trainer after two steps, in the order of the rows, and its losses."""
    from transformers import DataCollatorForLanguageModeling

    tok, rows = batches(directory)
    tok.padding_side = "right"  # no label is scored from a padded position then
    args = TrainingArguments(
        str(out), max_steps=2, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    trainer = Trainer(load(directory), args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collator)
    trainer.train()
    return trainer, [x["loss"] for x in trainer.state.log_history if "loss" in x]


def test_accumulation_does_not_change_the_loss(directory, tmp_path):
    """The loss is divided by the labels of all micro-batches, once."""
    whole, losses = train(directory, tmp_path, per_device_train_batch_size=8)
    parts, again = train(directory, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert again == pytest.approx(losses, rel=1e-4)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4, msg=name)
    assert whole.evaluate()["eval_loss"] < losses[0]


def test_bf16_and_checkpointing_of_trainer(directory, tmp_path):
    _, losses = train(directory, tmp_path, bf16=True, gradient_checkpointing=True)
    assert losses and all(0 < x < 20 for x in losses)


@pytest.mark.parametrize("targets", ["card", "all-linear"])
def test_lora_trains_merges_and_loads(directory, tmp_path, targets):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    from megatron_dla.hf.card import LORA_MODULES

    tok, rows = batches(directory)
    base = load(directory)
    model = get_peft_model(
        base, LoraConfig(target_modules=LORA_MODULES if targets == "card" else targets, task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    batch = tok.pad(rows[:4], return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = batch["input_ids"][2:3, -8:]
    with torch.no_grad():
        want = model(ids).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
        assert torch.equal(adapted(ids).logits, want)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-4)
        assert torch.equal(load(tmp_path / "merged").eval()(ids).logits, merged(ids).logits)


def test_layers_on_a_disk(directory, tmp_path):
    """accelerate moves each layer's weights in and out, and its inputs to where they are."""
    model, ids = load(directory).eval(), torch.arange(3, 23)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    split = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, device_map=places, offload_folder=str(tmp_path)
    ).eval()
    assert {x.device.type for x in split.model.layers[1].parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(split(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(split.generate(ids, **options), model.generate(ids, **options))
