"""Training through DeepSpeed at any layout against plain AdamW in one process, on random tokens and loss weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from megatron_dla import compat
from megatron_dla.config import ModelSection, OptimizerSection, ParallelSection, RunConfig, TrainingSection
from megatron_dla.data.packing import Batch
from megatron_dla.model.gpt import build_model, packed_sequence, slot_mixers
from megatron_dla.parallel.groups import process_groups
from megatron_dla.parallel.replicas import check_replicas, drifted
from megatron_dla.parallel.tags import get_tag
from megatron_dla.training.engine import build_engine, parameter_groups
from megatron_dla.training.schedule import lr_factor
from megatron_dla.training.step import train_step
from tests.support import workers
from tests.support.workers import BASE_SECTION, gathered_over, lay_out, layout_free, perturb

STEPS, ROWS, SEQ, VOCAB = 20, 4, 32, 60
BASE = dataclasses.replace(BASE_SECTION, hidden_size=24, ffn_hidden_size=32, init_std=0.15)
MAMBA = dataclasses.replace(BASE, num_groups=1, tau_mode="learned")
PUBLISHED = dataclasses.replace(BASE, num_groups=1, ffn_hidden_size=0, conv_bias=True, gated_norm="group")
GDN = dataclasses.replace(BASE, backbone="gdn", num_groups=4)
OTHERS = dataclasses.replace(BASE, num_layers=4, pattern="LGWM", num_groups=4)  # beside DLA; Log-Linear Mamba-2
HYBRID = dataclasses.replace(BASE, backbone="gdn", pattern="DA", tie_embeddings=True)
CONTROLS = dataclasses.replace(
    BASE, num_groups=4, boundary="random", boundary_rate=0.4, merge="random", control_seed=3, slot_weights="content"
)  # num_groups: one a head
TP2, SP2, TP4 = ParallelSection(2), ParallelSection(2, True), ParallelSection(4, True)
CP2, CP2TP2 = ParallelSection(context_parallel_size=2), ParallelSection(2, False, 2)
CHAIN = ParallelSection(context_parallel_size=2, cp_scheme="chain")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the matrix; the reference depends on `section` and `documents` only."""

    section: ModelSection
    parallel: ParallelSection = dataclasses.field(default_factory=ParallelSection)
    zero: int = 1
    documents: bool = True
    steps: int = STEPS
    training: tuple[tuple[str, Any], ...] = ()

    def config(self, world_size: int) -> RunConfig:
        training = {"steps": self.steps, "global_batch_size": ROWS, "micro_batch_size": 2, "zero_stage": self.zero}
        return RunConfig(
            model=self.section,
            parallel=self.parallel,
            optimizer=OptimizerSection(lr=2e-3, warmup_steps=3, clip_grad=0.5, eps=1e-4, tau_lr_ratio=2.0),
            training=TrainingSection(**training | dict(self.training)),
        )


def rows(step: int, numbers: list[int], documents: bool) -> Batch:
    """Rows `numbers` of a step's global batch: random tokens, loss weights and document borders."""
    tokens, labels, weights, borders = [], [], [], [0]
    for place, number in enumerate(numbers):
        gen = torch.Generator().manual_seed(1000 * step + number)
        ids = torch.randint(0, VOCAB, (SEQ + 1,), generator=gen)
        tokens.append(ids[:-1])
        labels.append(ids[1:])
        weights.append(torch.rand(SEQ, generator=gen) * (torch.rand(SEQ, generator=gen) > 0.2))
        inside = torch.randperm(SEQ - 1, generator=gen)[: 2 if documents else 0].sort().values
        borders += [place * SEQ + 1 + int(b) for b in inside] + [(place + 1) * SEQ]
    stacked = (torch.stack(x) for x in (tokens, labels, weights))
    return Batch(*stacked, torch.tensor(borders, dtype=torch.int32), torch.tensor(numbers))


def built(section: ModelSection, parallel: ParallelSection, recompute: str = "none") -> torch.nn.Module:
    """The tiny model, off its special start; D small, or the norm after it leaves D no gradient but rounding."""
    model = build_model(section, parallel, vocab_size=VOCAB, seq_len=SEQ, seed=4, recompute=recompute)
    perturb(model, section)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".D"):
                parameter *= 0.2
    return model


def reference(case: Case) -> dict[str, Any]:
    """Plain AdamW over whole batches: losses, norms, first gradients, final parameters."""
    lay_out(1)
    config = case.config(1)
    model = built(case.section, ParallelSection())
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, o, case.steps))
    result: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(case.steps):
        batch = rows(step, list(range(ROWS)), case.documents)
        packed = packed_sequence(batch.cu_seqlens, SEQ)
        losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=packed)
        loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            result["output"] = losses.detach()
            result["gradients"] = layout_free(model, {n: p.grad.clone() for n, p in model.named_parameters()})
        result["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad).item())
        optimizer.step()
        schedule.step()
        result["loss"].append(loss.item())
    result["parameters"] = layout_free(model, {n: p.detach() for n, p in model.named_parameters()})
    return result


def distributed(case: Case) -> dict[str, Any]:
    """The same through `train_step` and DeepSpeed at the case's layout."""
    compat.import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    lay_out(case.parallel.tensor_model_parallel_size, case.parallel.context_parallel_size)
    groups, config = process_groups(), case.config(torch.distributed.get_world_size())
    model = built(case.section, case.parallel, config.training.recompute)
    engine = build_engine(model, parameter_groups(model, config), config, groups, bf16=False)
    result: dict[str, Any] = {"loss": [], "norm": [], "output": first_output(engine, groups, case)}

    def packed(batch: Batch) -> Any:
        return packed_sequence(batch.cu_seqlens, SEQ)

    def keep_gradients() -> None:
        full = {n: safe_get_full_grad(p).detach().clone() for n, p in model.named_parameters()}
        result["counted"] = counted_in_the_norm(model, full, groups.tp)
        result["gradients"] = layout_free(model, full)

    mine = list(range(groups.dp.rank(), ROWS, groups.dp.size()))
    for step in range(case.steps):
        batches = [rows(step, mine[i : i + 2], case.documents) for i in range(0, len(mine), 2)]
        hook = keep_gradients if step == 0 else None
        loss = train_step(engine, batches, groups, torch.device("cpu"), packed, before_update=hook).loss
        result["loss"].append(loss)
        norm = engine.get_global_grad_norm()
        result["norm"].append(None if norm is None else float(norm))
    masters = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters()}
    full = {n: p.detach() if masters[n] is None else masters[n] for n, p in model.named_parameters()}
    result["parameters"] = layout_free(model, full)
    result["drifted"] = drifted(model, groups)
    result["kept"] = sum(len(mixer.decisions) for mixer in slot_mixers(model))
    engine.destroy()
    return result


def counted_in_the_norm(model, gradients: dict[str, torch.Tensor], tp) -> dict[str, float]:
    """Squared norm of each parameter's gradient as DeepSpeed adds it up over the tensor-parallel ranks."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    found = {}
    for name, parameter in model.named_parameters():
        square = gradients[name].double().square().sum()
        square *= is_model_parallel_parameter(parameter) or tp.rank() == 0
        torch.distributed.all_reduce(square, group=tp)
        found[" ".join(get_tag(parameter).keys(name))] = square.item()
    return found


def first_output(engine, groups, case: Case) -> torch.Tensor:
    """Token losses [ROWS, SEQ] of the first batch, before any step."""
    batch = rows(0, list(range(ROWS)), case.documents)
    tokens, labels = (workers.context_slice(x, groups.cp) for x in (batch.tokens, batch.labels))
    engine.eval()
    with torch.no_grad():
        losses = engine(tokens, None, None, labels=labels, packed_seq_params=packed_sequence(batch.cu_seqlens, SEQ))
    for module in engine.module.modules():
        if hasattr(module, "boundaries"):
            module.boundaries = None
    engine.train()
    return gathered_over(losses.detach(), groups.cp, 1)


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of each compared tensor or number."""
    found = {f"gradient of {k}": e for k, e in workers.errors(got["gradients"], want["gradients"]).items()}
    found |= {f"parameter {k}": e for k, e in workers.errors(got["parameters"], want["parameters"]).items()}
    found |= workers.errors({"output": got["output"]}, {"output": want["output"]})
    for keys, square in got["counted"].items():
        real = sum(want["gradients"][key].double().square().sum().item() for key in keys.split())
        found[f"counted {keys}"] = abs(square - real) / real / 2
    for key in ("loss", "norm"):
        for step, (a, b) in enumerate(zip(got[key], want[key], strict=True)):
            if a is not None:  # DeepSpeed's stage 0 reports no norm
                found[f"{key} of step {step}"] = abs(a - b) / abs(b)
    return found


def parity(case: Case, want: dict[str, Any]) -> tuple[dict[str, float], list[str], int]:
    """(relative errors, drifted parameters, gradient norms compared)."""
    got = distributed(case)
    return differences(got, want), got["drifted"], sum(norm is not None for norm in got["norm"])


def recomputed(case: Case, want: dict[str, Any]) -> tuple[dict[str, float], int, int, int]:
    """(errors, partition calls, recurrence calls, partitions kept after the last step): none is decided twice."""
    from megatron_dla.mixers import recurrence

    originals, calls = {name: getattr(recurrence, name) for name in ("partition", "dla_attention")}, Counter()

    def counting(name: str):
        def run(*args, **kwargs):
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return run

    for name in originals:
        setattr(recurrence, name, counting(name))
    try:
        got = distributed(case)
    finally:
        for name, function in originals.items():
            setattr(recurrence, name, function)
    return differences(got, want), calls["partition"], calls["dla_attention"], got["kept"]


def drift(case: Case) -> tuple[str, str]:
    """What `check_replicas` says of a fresh engine, and after one bit of one replica was changed on one rank."""
    compat.import_deepspeed()
    lay_out(case.parallel.tensor_model_parallel_size, case.parallel.context_parallel_size)
    groups, config = process_groups(), case.config(torch.distributed.get_world_size())
    model = built(case.section, case.parallel)
    engine = build_engine(model, parameter_groups(model, config), config, groups, bf16=False)
    said = []
    for change in (0.0, 1e-6):
        if torch.distributed.get_rank() == 1:
            parameter = dict(model.named_parameters())["decoder.layers.1.self_attention.norm"]
            getattr(parameter, "ds_tensor", parameter).data[0] *= 1 + change
        try:
            check_replicas(model, groups, "here")
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    engine.destroy()
    return said[0], said[1]
