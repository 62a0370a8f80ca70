"""`dla bench export`: an exported model in plain torch on one CPU thread, beside transformers' models of its size.

Sizes are those of `make demo` (3.7M parameters). Weights are random, so nearly every token opens a slot: the most work
that decisions can make; a directory given by the user is measured with its own weights. Times are processor time, the
fastest of the repeats.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from megatron_dla.errors import UserError
from megatron_dla.resources import resource

from ..dla import dla_attention, partition
from .inputs import TAU, Inputs, Problem, make_inputs
from .report import environment, write_json
from .timing import Stopwatch, seconds

VOCAB = 2048
PROMPTS, BATCHES, PADDED = (512, 4096), (1, 8, 32), (8, 512)
CONTEXT, STEPS, REPEATS = 256, 16, 12  # of decoding: tokens before, tokens a repeat, repeats
LENGTHS, RECURRENT = (4096, 8192, 16384), 256


def demo_model() -> dict[str, Any]:
    """The model section of `make demo`."""
    return yaml.safe_load((resource("configs") / "demo_cpu.yaml").read_text())["model"]


def demo_like(backbone: str) -> Any:
    """A model of `make demo`'s size with random weights."""
    from megatron_dla.config import ModelSection
    from megatron_dla.hf.random_model import random_model

    groups = {"num_groups": 1} if backbone == "mamba2" else {}
    return random_model(ModelSection(**demo_model() | {"backbone": backbone, **groups}), VOCAB)


def models() -> dict[str, Callable[[], Any]]:
    """Name -> constructor, all of 3.7M parameters or so."""
    from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

    demo = demo_model()
    heads, layers = demo["attention_heads"], demo["num_layers"]
    shared: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": demo["hidden_size"], "num_hidden_layers": layers}
    llama = LlamaConfig(
        **shared, intermediate_size=demo["ffn_hidden_size"], num_attention_heads=heads, num_key_value_heads=heads
    )
    mamba2 = Mamba2Config(**shared | {"num_hidden_layers": 6}, num_heads=8, head_dim=64, state_size=64, n_groups=1)
    return {
        "dla mamba2": lambda: demo_like("mamba2"), "dla gdn": lambda: demo_like("gdn"),
        "llama": lambda: LlamaForCausalLM(llama), "mamba2": lambda: Mamba2ForCausalLM(mamba2),
    }  # fmt: skip


def model_rates(model: Any, watch: Stopwatch) -> dict[str, float]:
    """Parameters, tokens/s of prefill and decoding, and the time of a padded batch over that of the whole one."""
    vocab = min(VOCAB, model.config.vocab_size)
    ids = torch.randint(3, vocab, (max(BATCHES), max(PROMPTS)), generator=torch.Generator().manual_seed(0))
    made = {"parameters": float(sum(p.numel() for p in model.parameters()))}

    def prefill(batch: int, tokens: int, mask: torch.Tensor | None = None) -> Any:
        return model(ids[:batch, :tokens], attention_mask=mask, use_cache=True, logits_to_keep=1)

    for tokens in PROMPTS:
        made[f"prefill {tokens}"] = 1e3 * tokens / watch.measure(partial(prefill, 1, tokens)).low
    for batch in BATCHES:
        prompt = prefill(batch, CONTEXT)
        name = next(n for n in ("cache_params", "past_key_values", "cache") if getattr(prompt, n, None) is not None)

        def decode(memory: Any, batch: int = batch, name: str = name) -> None:
            for t in range(STEPS):
                model(ids[:batch, t : t + 1], **{name: memory}, use_cache=True)

        caches = (copy.deepcopy(getattr(prompt, name)) for _ in range(REPEATS))  # every repeat at the same context
        made[f"decode {batch}"] = 1e3 * STEPS * batch / min(watch.once(partial(decode, memory)) for memory in caches)
    mask = torch.ones(PADDED, dtype=torch.int64)
    whole = watch.measure(partial(prefill, *PADDED, mask)).low
    mask[0, : PADDED[1] // 3] = 0
    return made | {"padded": watch.measure(partial(prefill, *PADDED, mask)).low / whole}


def _both_ways(call: Callable[..., torch.Tensor], x: Inputs) -> Callable[[], None]:
    def run() -> None:
        x.require_grad()
        call(*x.arguments()).backward(x.dout)

    return run


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    q, k = (t.expand(*v.shape[:3], -1) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)


def attention_times(backbone: str, heads: int, watch: Stopwatch) -> dict[str, float]:
    """Microseconds a token, forward and backward, D = 64, K = 30; the recurrence's at T = 256, where it is cheapest."""

    def dla(*arguments: Any, backend: str = "torch") -> torch.Tensor:
        return dla_attention(*arguments, tau=TAU, capacity=30, backend=backend)[0]

    made = {}
    for tokens in LENGTHS:
        x = make_inputs(Problem(backbone, tokens, 64, 30, heads), 0, dtype=torch.float32)
        made[f"dla {tokens}"] = 1e3 * watch.measure(_both_ways(dla, x)).low / tokens
        made[f"sdpa {tokens}"] = 1e3 * watch.measure(_both_ways(_sdpa, x)).low / tokens
        decided = partition(x.k, x.v, x.g, x.beta, tau=TAU, capacity=30)
        made[f"boundaries {tokens}"] = float(decided.boundary_rate().mean())
    x = x.rows(0, RECURRENT)
    slow = watch.once(_both_ways(lambda *a: dla(*a, backend="naive"), x))
    return made | {"recurrence": 1e3 * slow / RECURRENT}


def _say(name: str, numbers: dict[str, float], width: int = 20) -> None:
    cells = (f"{key}: {value:,.2f}" if value < 10 else f"{key}: {value:,.0f}" for key, value in numbers.items())
    print(f"{name:{width}s} | {' | '.join(cells)}", flush=True)


def bench_export(args: argparse.Namespace) -> int:
    """Print and write every number, a row at a time; exit code 0. Raises UserError for a wrong path."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file: give a directory")
    rows = models()
    if args.model:
        from megatron_dla.hf.load import load_export

        rows = {args.model: lambda: load_export(args.model, dtype=torch.float32), **rows}
    torch.set_num_threads(1)
    device = torch.device("cpu")
    watch, results = Stopwatch(device, seconds(args.budget)), environment(device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "export_cpu.json"
    print(f"torch {results['torch']}, one thread, processor time; tokens/s; padded: time over that of whole rows")
    for name, make in rows.items():
        torch.manual_seed(0)
        with torch.no_grad():
            results[name] = model_rates(make().eval(), watch)
        _say(name, results[name])
        write_json(path, results)
    if args.attention:
        print("dla_attention, D = 64, K = 30, forward and backward, microseconds a token")
        for backbone in args.backbones:
            for heads in (4, 16):
                name = f"{backbone}, {heads} heads"
                results[name] = attention_times(backbone, heads, watch)
                _say(name, results[name])
                write_json(path, results)
    print(f"wrote {path}")
    return 0
