"""Compare the logits of the exported model with the checkpoint's, on the same tokens.

In fp32 first, where two correct models can differ: the packed projection rounds differently from separate ones, and a
boundary score within that rounding of tau may fall on either side. Then float64 decides, where no such tie is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.checkpoint.find import resolve_checkpoint
from megatron_dla.checkpoint.weights import CheckpointLayout, load_merged, split_merged
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.hf.load import check_tokenizer, load_export


def _largest(values: list[float]) -> float:
    """The largest; not a number where any is not (Python's max would hide it)."""
    return torch.tensor(values, dtype=torch.float64).max().item()


@dataclass
class Report:
    """Differences between the two models' logits.

    Attributes:
        max_difference: largest absolute difference of a logit. same_argmax: share of tokens with the same best token.
        decode_difference: largest difference of the exported model's prefill + token-by-token logits from its full
            pass.
        tokens: of the longer of the two rows compared. dtype: that both models ran in.
    """

    max_difference: float
    same_argmax: float
    decode_difference: float
    tokens: int
    dtype: str = "fp32"

    @property
    def worst(self) -> float:
        return _largest([self.max_difference, self.decode_difference])

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.dtype} logits: largest difference {self.max_difference:.3g}, "
            f"same best token {self.same_argmax:.2%}, prefill + decode against full pass {self.decode_difference:.3g}"
        )


def megatron_model(checkpoint: str | Path) -> tuple[Any, CheckpointLayout]:
    """The checkpoint's Megatron model at TP = 1 on the CPU, fp32, in this process.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    from megatron_dla import compat

    compat.install()
    from megatron_dla.config import ParallelSection
    from megatron_dla.model.gpt import build_model
    from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel

    merged, layout = load_merged(checkpoint)
    initialize_distributed("cpu")
    initialize_model_parallel(1, 0)
    section, size = layout.model, layout.vocab_size
    model = build_model(section, ParallelSection(), vocab_size=size, seq_len=layout.seq_len, seed=0)
    from megatron_dla.checkpoint.weights import parameter_tags

    local = split_merged(merged, parameter_tags(model), 0, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(local[name])
    return model.eval(), layout


@torch.no_grad()
def megatron_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, padded vocabulary] of ids [B, T]."""
    position = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, position, None)


@torch.no_grad()
def decode_logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits [B, T, vocab] of the exported model: `prompt` tokens at once, the others one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for t in range(prompt, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def compare(reference: Any, exported: Any, rows: list[Tensor], dtype: str = "fp32") -> Report:
    """Both models, as they are, on rows [1, T] of token ids; the last row also token by token from its middle on."""
    differences, shares = [], []
    for ids in rows:
        ours, theirs = megatron_logits(reference, ids), exported(ids, use_cache=False).logits
        differences.append((ours - theirs).abs().max().item())
        shares.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    stepped = decode_logits(exported, rows[-1], max(1, rows[-1].shape[1] // 2))
    decode = (theirs - stepped).abs().max().item()
    return Report(_largest(differences), min(shares), decode, max(ids.shape[1] for ids in rows), dtype)


def _token_rows(vocab: int, tokens: int) -> list[Tensor]:
    """Two rows [1, T]: one of `tokens` tokens, and one that ends inside a chunk of the recurrence (T % 64 != 0)."""
    odd = max(1, tokens - 37 if (tokens - 37) % 64 else tokens - 38)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (1, n), generator=generator) for n in (tokens, odd)]


def verify(checkpoint_dir: str | Path, hf_dir: str | Path, *, tolerance: float = 1e-4, tokens: int = 256) -> Report:
    """Compare the checkpoint's model (Megatron, TP = 1, CPU) with the exported one; prints the report.

    Args:
        checkpoint_dir: step_N or run directory. tolerance: largest allowed difference of a logit.
        tokens: length of the longer row of random tokens.

    Raises:
        UserError: a difference over the tolerance. CheckpointError: either side is missing or incomplete.
    """
    if not 1 <= tokens <= 65536 or not tolerance > 0:
        raise UserError(f"tokens = {tokens}, tolerance = {tolerance}: want 1 to 65536 tokens, a positive tolerance")
    checkpoint, out = resolve_checkpoint(checkpoint_dir), Path(hf_dir)
    CheckpointLayout.load(checkpoint)  # before anything slow
    exported = load_export(out, dtype=torch.float32)
    check_tokenizer(out)
    reference, layout = megatron_model(checkpoint)
    if exported.config.vocab_size != layout.vocab_size:
        raise CheckpointError(
            f"{str(out)!r} has {exported.config.vocab_size} vocabulary rows, the checkpoint {layout.vocab_size}: "
            "it is the export of another model"
        )
    rows = _token_rows(layout.vocab_size, tokens)
    report = compare(reference, exported, rows)
    print(report, flush=True)
    if not report.worst <= tolerance:
        print("over the tolerance: repeated in float64, where rounding cannot move a boundary", flush=True)
        report = compare(reference.double(), exported.double(), rows, "float64")
        print(report, flush=True)
    if not report.worst <= tolerance:
        raise UserError(
            f"{str(out)!r} differs from {str(checkpoint)!r} by {report.worst:.3g}, tolerance {tolerance:g}: convert "
            "again (a bf16 export of fp32 weights differs by its rounding: verify an fp32 one)"
        )
    return report
