"""Model stages: a short training (with the trainer where Megatron is installed), export, reload, generate."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_dla.kernels.bench.stages import CheckFailed, Skipped, Stages
from megatron_dla.smoke.text import document, write_corpus

TRAINER_NEEDS = ("megatron.core", "deepspeed", "transformers", "sentencepiece", "yaml", "psutil")
EXPORT_NEEDS = ("transformers", "safetensors", "sentencepiece", "huggingface_hub", "yaml")
PROMPT = "In the harbour, the ship "


@dataclass(frozen=True)
class Recipe:
    """Model and training for one type of device; the loss must fall by the share `fall` of its start."""

    model: dict[str, Any]
    steps: int
    seq_len: int
    rows: int
    lr: float
    characters: int
    fall: float
    vocab_size: int = 512


RECIPES = {
    "cuda": Recipe(  # the model of configs/smoke_gpu.yaml: a test compares them
        model={
            "hidden_size": 768, "num_layers": 10, "backbone": "gdn", "num_heads": 6, "num_groups": 6, "key_dim": 96,
            "value_dim": 192, "capacity": 15, "tau": 1.2, "ffn_hidden_size": 2048, "attention_heads": 12,
            "attention_groups": 12, "init_std": 0.02, "vocab_multiple": 32768,
        },
        steps=50, seq_len=2048, rows=8, lr=1e-3, characters=4_000_000, fall=0.3,
    ),
    "cpu": Recipe(
        model={
            "hidden_size": 64, "num_layers": 2, "backbone": "gdn", "num_heads": 2, "num_groups": 2, "key_dim": 16,
            "value_dim": 32, "capacity": 4, "tau": 1.2, "ffn_hidden_size": 128, "attention_heads": 2,
            "attention_groups": 2, "init_std": 0.05, "vocab_multiple": 128,
        },
        steps=30, seq_len=128, rows=8, lr=8e-3, characters=200_000, fall=0.15, vocab_size=384,
    ),
}  # fmt: skip


def not_installed(names: tuple[str, ...]) -> list[str]:
    """Those of the packages that cannot be imported."""
    absent = []
    for name in names:
        try:
            if importlib.util.find_spec(name) is None:
                absent.append(name)
        except (ImportError, ValueError):
            absent.append(name)
    return absent


@dataclass
class ModelSmoke:
    """State of the model stages."""

    device: str
    recipe: Recipe
    work: Path
    seed: int
    stages: Stages
    through_trainer: bool = False
    model: Any = None
    losses: list[float] = field(default_factory=list)

    @property
    def exported(self) -> Path:
        return self.work / "hf"

    def train(self) -> None:
        """A few dozen steps; the loss must fall and stay finite."""
        if absent := not_installed(EXPORT_NEEDS):
            raise Skipped(f"not installed: {', '.join(absent)}")
        os.environ.setdefault("HF_MODULES_CACHE", str(self.work / "modules"))  # exported code is copied to it
        absent = not_installed(TRAINER_NEEDS)
        self.through_trainer = not absent
        if self.through_trainer:
            self.stages.say("with `dla run` (Megatron-Core and DeepSpeed)")
            self._train_with_trainer()
        else:
            self.stages.say(f"not with `dla run`, not installed: {', '.join(absent)}")
            self.stages.say("with the Hugging Face model and AdamW instead: same kernels, same sizes")
            self._train_plain()
        self._check_losses()

    def _check_losses(self) -> None:
        if not all(math.isfinite(x) for x in self.losses):
            raise CheckFailed(f"the loss is not finite: {self.losses}")
        ends = max(1, len(self.losses) // 10)
        first, last = (sum(part) / ends for part in (self.losses[:ends], self.losses[-ends:]))
        self.stages.facts |= {"first_loss": first, "last_loss": last, "steps": len(self.losses)}
        self.stages.say(f"{len(self.losses)} steps, loss {first:.3f} -> {last:.3f} ({1 - last / first:.0%} less)")
        if not last <= (1 - self.recipe.fall) * first:
            raise CheckFailed(f"loss {first:.3f} -> {last:.3f}: want at least {self.recipe.fall:.0%} less")

    def _speed(self, tokens_per_s: float, memory_gb: float, parameters: int) -> None:
        self.stages.facts |= {"tokens_per_s": tokens_per_s, "peak_memory_gb": memory_gb, "parameters": parameters}
        words = f"{parameters / 1e6:.1f}M parameters, {tokens_per_s:,.0f} tokens/s, peak memory {memory_gb:.2f} GB"
        self.stages.say(words)

    def _dla(self, *arguments: str) -> str:
        """Output of a `dla` command in its own process. Raises CheckFailed with its last lines if it fails."""
        self.stages.say(f"$ dla {shlex.join(arguments)}")
        command = [sys.executable, "-m", "megatron_dla.cli", *arguments]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise CheckFailed(f"dla {' '.join(arguments[:2])} ended with exit code {done.returncode}:\n{tail}")
        return done.stdout

    def _train_with_trainer(self) -> None:
        r, data = self.recipe, self.work / "data"
        corpus = str(write_corpus(self.work / "corpus" / "text.jsonl", r.characters, self.seed))
        self._dla("data", "tokenizer", "--input", corpus, "--output", str(data), "--vocab-size", str(r.vocab_size))
        self._dla("data", "shards", "--input", corpus, "--tokenizer", str(data), "--output", str(data / "shards"),
                  "--min-train-shards", "8")  # fmt: skip
        config = self.work / "config.yaml"
        sections = {
            "run": {"name": "run", "dir": str(self.work), "seed": self.seed},
            "data": {"dir": str(data / "shards"), "seq_len": r.seq_len, "num_streams": 8},
            "model": r.model,
            "optimizer": {"lr": r.lr, "warmup_steps": 5},
            "training": {
                "steps": r.steps, "global_batch_size": r.rows, "micro_batch_size": r.rows, "device": self.device,
                "log_every": 1, "eval_every": 0, "save_every": 0,
            },
        }  # fmt: skip
        config.write_text(json.dumps(sections, indent=1))  # JSON is YAML
        self._dla("run", str(config), "--nproc", "1")
        from megatron_dla.metrics.sinks import read_metrics

        lines = [m for m in read_metrics(self.work / "run" / "metrics.jsonl") if "loss" in m]
        self.losses = [m["loss"] for m in lines]
        late = sorted(m["tokens_per_s"] for m in lines[len(lines) // 2 :])
        self._speed(late[len(late) // 2], max(m["memory_gb"] for m in lines), self._parameters())

    def _parameters(self) -> int:
        from megatron_dla.config import ModelSection
        from megatron_dla.model.counts import count_parameters

        multiple = self.recipe.model["vocab_multiple"]
        return count_parameters(ModelSection(**self.recipe.model), -(-self.recipe.vocab_size // multiple) * multiple)

    def _bare_directory(self) -> Path:
        """A directory with a model's code and config, without weights, as `dla convert to-hf` writes them."""
        from megatron_dla.hf.code_files import code_files

        bare = self.work / "bare"
        bare.mkdir(parents=True)
        for name, path in code_files().items():
            shutil.copyfile(path, bare / name)
        fields = {k: v for k, v in self.recipe.model.items() if k != "vocab_multiple"}
        vocab = self.recipe.model["vocab_multiple"]
        classes = {
            "AutoConfig": "configuration_dla.DLAConfig",
            "AutoModelForCausalLM": "modeling_dla.DLAForCausalLM",
        }
        config = {"model_type": "dla", "auto_map": classes, "vocab_size": vocab, **fields}
        (bare / "config.json").write_text(json.dumps(config, indent=1))
        return bare

    def _train_plain(self) -> None:
        """AdamW on fp32 master weights; tokens are the bytes of the text."""
        import random

        from transformers import AutoConfig, AutoModelForCausalLM

        r, cuda = self.recipe, self.device == "cuda"
        torch.manual_seed(self.seed)
        config = AutoConfig.from_pretrained(str(self._bare_directory()), trust_remote_code=True)
        dtype = torch.bfloat16 if cuda else torch.float32
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=dtype).to(self.device).train()
        rng = random.Random(self.seed)
        text = "".join(document(rng) for _ in range(r.characters // 1000)).encode()
        stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        masters = [p.detach().float().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=r.lr, betas=(0.9, 0.95), weight_decay=0.1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for step in range(r.steps):
            begin = time.monotonic()
            starts = [rng.randrange(len(stream) - r.seq_len) for _ in range(r.rows)]
            ids = torch.stack([stream[s : s + r.seq_len] for s in starts]).long().to(self.device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            _adamw_step(model, masters, optimizer, r.lr * min(1.0, (step + 1) / 5))
            self.losses.append(float(loss.detach()))
            seconds.append(time.monotonic() - begin)
        half = sorted(seconds[len(seconds) // 2 :])
        from megatron_dla.metrics.meters import memory_gb

        rate = r.rows * r.seq_len / half[len(half) // 2]
        self._speed(rate, memory_gb(torch.device(self.device)), sum(p.numel() for p in model.parameters()))
        self.model = model.eval()

    def export(self) -> None:
        """Export to a Hugging Face directory and load it; the logits must be equal."""
        if self.through_trainer:
            checkpoints = sorted((self.work / "run" / "checkpoints").glob("step_*"))
            self._dla("convert", "to-hf", str(checkpoints[-1]), str(self.exported))
            out = self._dla("convert", "verify", str(checkpoints[-1]), str(self.exported))
            self.stages.say(out.strip().splitlines()[-1])
            return
        ids = torch.tensor([list(PROMPT.encode() * 8)], device=self.device)
        self.model.save_pretrained(str(self.exported))
        with torch.no_grad():
            wanted = self.model(input_ids=ids).logits
            found = self._load()(input_ids=ids).logits
        if not torch.equal(found, wanted):
            raise CheckFailed(f"logits differ by {float((found - wanted).abs().max()):.2e} after saving and loading")
        self.stages.say(f"save_pretrained, from_pretrained: {ids.shape[1]} x {wanted.shape[-1]} logits, bit-equal")

    def _load(self) -> Any:
        from megatron_dla.hf.load import load_export

        return load_export(self.exported, device=self.device)

    def generate(self) -> None:
        """Greedy generation after a short and a long prompt; the cache must have the same size."""
        model = self._load()
        if self.through_trainer:
            from megatron_dla.hf.load import load_export_tokenizer

            tokenizer = load_export_tokenizer(self.exported)
            encode, decode = (lambda text: tokenizer(text)["input_ids"]), tokenizer.decode
        else:
            encode, decode = _to_bytes, _from_bytes
        sizes = []
        for repeats in (1, 16):
            ids = torch.tensor([encode(PROMPT * repeats)], device=self.device)
            with torch.no_grad():
                sizes.append(model(input_ids=ids, use_cache=True).past_key_values.nbytes)
                done = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False,
                    return_dict_in_generate=True,
                )  # fmt: skip
            sizes.append(done.past_key_values.nbytes)
            if repeats == 1:
                self.stages.say(f"{PROMPT!r} -> {decode(done.sequences[0, ids.shape[1] :].tolist())!r}")
        self.stages.facts["cache_bytes"] = sizes
        if len(set(sizes)) != 1:
            raise CheckFailed(f"the cache's bytes are not constant over the context: {sizes}")
        self.stages.say(f"cache {sizes[0]:,} bytes, before and after, after a short and a long prompt")


def _to_bytes(text: str) -> list[int]:
    return list(text.encode())


def _from_bytes(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


@torch.no_grad()
def _adamw_step(model: Any, masters: list[torch.Tensor], optimizer: Any, lr: float) -> None:
    """One step on the fp32 masters with clipped gradients, copied back to the model."""
    for master, p in zip(masters, model.parameters(), strict=True):
        master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float()
        p.grad = None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for master, p in zip(masters, model.parameters(), strict=True):
        p.copy_(master)
        master.grad = None
