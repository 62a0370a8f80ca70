"""Compare an export with its checkpoint: every weight, one by one, then the logits of both models on the same tokens.

The logits in fp32 first, where two correct models can differ: the packed projection rounds differently from separate
ones, and a boundary score within that rounding of tau may fall on either side. Then float64 decides, where no such tie
is left.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.checkpoint.find import resolve_checkpoint
from megatron_dla.checkpoint.weights import CheckpointLayout, MergedWeights, split_merged
from megatron_dla.console import progress_bar
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.hf.directory import DirectoryWeights
from megatron_dla.hf.load import check_tokenizer, load_export
from megatron_dla.hf.mapping import check_names, to_hf_names
from megatron_dla.hf.section import read_section
from megatron_dla.parallel.tags import get_tag


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

    weights = MergedWeights(checkpoint)
    layout = weights.layout
    initialize_distributed("cpu")
    initialize_model_parallel(1, 0)
    section, size = layout.model, layout.vocab_size
    model = build_model(section, ParallelSection(), vocab_size=size, seq_len=layout.seq_len, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(split_merged(weights, {name: get_tag(parameter)}, 0, 1)[name])
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


def reference_logits(checkpoint: Path, rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of the checkpoint's Megatron model, run in `dtype`, on rows [1, T]; the model is gone afterwards."""
    model = megatron_model(checkpoint)[0].to(dtype)
    logits = [megatron_logits(model, ids) for ids in rows]
    del model
    gc.collect()  # its modules refer to each other
    return logits


@torch.no_grad()
def compare(want: list[Tensor], exported: Any, rows: list[Tensor], dtype: torch.dtype) -> Report:
    """The exported model's logits on rows [1, T] and those wanted; the last row also one by one from its middle on."""
    differences, shares = [], []
    for ids, ours in zip(rows, want, strict=True):
        theirs = exported(ids, use_cache=False).logits
        differences.append((ours - theirs).abs().max().item())
        shares.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    stepped = decode_logits(exported, rows[-1], max(1, rows[-1].shape[1] // 2))
    decode = (theirs - stepped).abs().max().item()
    longest = max(ids.shape[1] for ids in rows)
    return Report(_largest(differences), min(shares), decode, longest, "fp32" if dtype == torch.float32 else "float64")


def _token_rows(vocab: int, tokens: int) -> list[Tensor]:
    """Two rows [1, T]: one of `tokens` tokens, and one that ends inside a chunk of the recurrence (T % 64 != 0)."""
    odd = max(1, tokens - 37 if (tokens - 37) % 64 else tokens - 38)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (1, n), generator=generator) for n in (tokens, odd)]


def compare_weights(checkpoint: Path, hf_dir: Path) -> str:
    """What was compared, one tensor at a time: all equal in both directories, rounded to the export's dtype.

    Raises:
        UserError: a tensor differs. CheckpointError: either side is missing or incomplete, or another model's.
    """
    weights, stored = MergedWeights(checkpoint), DirectoryWeights(hf_dir)
    state = to_hf_names(weights, weights.layout.model)
    check_names(set(stored), set(state), repr(str(hf_dir)))
    rounded: set[str] = set()
    with progress_bar(weights.parameters, "comparing weights", unit=" parameters") as bar:
        for name, want in state.items():
            got = stored[name]
            if got.shape != want.shape:
                raise CheckpointError(
                    f"{str(hf_dir)!r}: {name} has shape {list(got.shape)}, in the checkpoint {list(want.shape)}: it is "
                    "the export of another model"
                )
            if not torch.equal(got, want.to(got.dtype)):
                raise UserError(f"{str(hf_dir)!r}: {name} differs from {str(checkpoint)!r}: convert again")
            if got.dtype != want.dtype:
                rounded.add(str(got.dtype).removeprefix("torch."))
            bar.update(got.numel())
    note = f" once rounded to the export's {' and '.join(sorted(rounded))}" if rounded else ""
    return f"{weights.parameters:,} parameters are equal{note}"


def verify(
    checkpoint_dir: str | Path,
    hf_dir: str | Path,
    *,
    tolerance: float = 1e-4,
    tokens: int = 256,
    weights_only: bool = False,
    trust_remote_code: bool = False,
) -> Report | None:
    """Compare the checkpoint with the export; prints what was compared.

    Args:
        checkpoint_dir: step_N or run directory. tolerance: largest allowed difference of a logit.
        tokens: length of the longer row of random tokens.
        weights_only: do not build the two models (Megatron's, TP = 1, CPU, then the export's), each of which holds all
            weights in fp32, and return None.
        trust_remote_code: run the export with the code beside it instead of this package's.

    Raises:
        UserError: a weight that differs, or a logit by more than the tolerance. CheckpointError: either side is missing
            or incomplete.
    """
    if not 1 <= tokens <= 65536 or not tolerance > 0:
        raise UserError(f"tokens = {tokens}, tolerance = {tolerance}: want 1 to 65536 tokens, a positive tolerance")
    checkpoint, out = resolve_checkpoint(checkpoint_dir), Path(hf_dir)
    layout = CheckpointLayout.load(checkpoint)
    rows = read_section(out)[1].get("vocab_size")
    if rows != layout.vocab_size:
        raise CheckpointError(
            f"{str(out)!r} has {rows} vocabulary rows, the checkpoint {layout.vocab_size}: "
            "it is the export of another model"
        )
    check_tokenizer(out)
    print(compare_weights(checkpoint, out), flush=True)
    return None if weights_only else verify_logits(checkpoint, out, tolerance, tokens, trust_remote_code)


def verify_logits(
    checkpoint: Path, out: Path, tolerance: float, tokens: int, trust_remote_code: bool = False
) -> Report:
    """The second half of `verify`, with its arguments. One of the two models is in memory at a time."""
    rows = _token_rows(CheckpointLayout.load(checkpoint).vocab_size, tokens)
    for dtype in (torch.float32, torch.float64):
        want = reference_logits(checkpoint, rows, dtype)
        exported = load_export(out, dtype=torch.float32, trust_remote_code=trust_remote_code).to(dtype)
        report = compare(want, exported, rows, dtype)
        del exported  # before the next pair is read
        print(report, flush=True)
        if report.worst <= tolerance:
            return report
        if dtype == torch.float32:
            print("over the tolerance: repeated in float64, where rounding cannot move a boundary", flush=True)
    raise UserError(
        f"{str(out)!r} differs from {str(checkpoint)!r} by {report.worst:.3g}, tolerance {tolerance:g}: convert again "
        "(a bf16 export of fp32 weights differs by its rounding: verify an fp32 one)"
    )
