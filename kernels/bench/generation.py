"""Generation speed of an export of a shipped config's size, with random weights, by `generate` of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_dla.config import ModelSection, load_config, to_dict
from megatron_dla.hf.random_model import random_model
from megatron_dla.tasks.pretrain import ASSUMED_VOCABULARY

from .report import environment, write_json
from .run import resolve_device
from .timing import Stopwatch

PROMPT, TOKENS, BATCHES = 2048, 64, (1, 16)


@torch.no_grad()
def rates(model: Any, prompt: int, tokens: int, batches: tuple[int, ...], watch: Stopwatch) -> dict[str, float]:
    """Tokens a second of reading a prompt, and of greedy decoding at each batch size (prompt left out)."""
    vocabulary, found = model.config.vocab_size, {}
    for batch in batches:
        ids = torch.randint(3, vocabulary, (batch, prompt), device=model.device)

        def read(ids: torch.Tensor = ids) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        def both(ids: torch.Tensor = ids) -> None:
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        seconds = watch.measure(read).ms / 1e3
        found[f"prefill batch {batch}"] = batch * prompt / seconds
        found[f"decode batch {batch}"] = batch * (tokens - 1) / max(watch.measure(both).ms / 1e3 - seconds, 1e-9)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="dla_mamba2_780m", help="a shipped config (default: dla_mamba2_780m)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds of repeats a measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    args = parser.parse_args()
    device = resolve_device(args.device)
    section = ModelSection(**to_dict(load_config(args.config))["model"])
    model = random_model(section, ASSUMED_VOCABULARY).to(torch.bfloat16).to(device).eval()
    found = rates(model, PROMPT, TOKENS, BATCHES, Stopwatch(device, budget_s=args.budget, least=2))
    for name, rate in found.items():
        print(f"{args.config} in bf16, prompt {PROMPT}, {name}: {rate:,.0f} tokens/s")
    path = write_json(
        args.out / f"generation_{device.type}.json",
        {**environment(device), "config": args.config, "prompt": PROMPT, "new_tokens": TOKENS, "tokens_per_s": found},
    )
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
