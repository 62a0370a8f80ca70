"""The DeepSpeed engine over a Megatron model: parameter groups, ZeRO configuration, the mpu."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_dla import compat
from megatron_dla.config import AdapterRunConfig, RunConfig
from megatron_dla.mixers.layout import FP32_PARAMETERS
from megatron_dla.parallel.mpu import make_mpu
from megatron_dla.training.schedule import lr_factor


def parameter_groups(model: nn.Module, config: RunConfig | AdapterRunConfig) -> list[dict[str, Any]]:
    """AdamW groups: matrices with weight decay; norms and per-head scalars without; a learned tau with its own rate.

    Groups are also split by dtype: under bf16 the scalars of the recurrence stay fp32, and ZeRO flattens a group.
    """
    section = config.optimizer
    groups: dict[tuple[str, torch.dtype], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:  # a frozen backbone under an adapter
            continue
        leaf = name.rsplit(".", 1)[-1]
        kind = "tau" if leaf == "tau" else "plain" if p.ndim < 2 or leaf in FP32_PARAMETERS else "decay"
        lr = section.lr * (section.tau_lr_ratio if kind == "tau" else 1.0)
        decay = section.weight_decay if kind == "decay" else 0.0
        group = groups.setdefault((kind, p.dtype), {"params": [], "lr": lr, "weight_decay": decay, "name": kind})
        group["params"].append(p)
    return [groups[key] for key in sorted(groups, key=str)]


def deepspeed_config(config: RunConfig | AdapterRunConfig, dp_size: int, bf16: bool) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    training = config.training
    accumulation = training.global_batch_size // (training.micro_batch_size * dp_size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": training.zero_stage},
    }
    if training.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_force_ds_cpu_optimizer"] = False  # use torch's AdamW: DeepSpeed's needs a compiler
    if bf16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"  # else sums over ranks are bf16, also of fp32 parameters
    return settings


def apply_optimizer_section(engine: Any, groups: list[dict[str, Any]], config: RunConfig | AdapterRunConfig) -> None:
    """Apply the config's learning rate, betas, eps and weight decay after a load, which restores the saved ones.

    Args:
        groups: `parameter_groups` of the model, in the order the optimizer was built with.
    """
    section, schedule = config.optimizer, engine.lr_scheduler
    factor = lr_factor(schedule.last_epoch, section, config.training.steps)
    for group, wanted in zip(schedule.optimizer.param_groups, groups, strict=True):
        assert group["name"] == wanted["name"]
        group["initial_lr"], group["lr"] = wanted["lr"], wanted["lr"] * factor
        group["weight_decay"] = wanted["weight_decay"]
        group["betas"], group["eps"] = (section.beta1, section.beta2), section.eps
    schedule.base_lrs = [wanted["lr"] for wanted in groups]


def build_engine(
    model: nn.Module,
    optimizer_groups: list[dict[str, Any]],
    config: RunConfig | AdapterRunConfig,
    groups: Any,
    bf16: bool,
) -> Any:
    """A DeepSpeed engine whose gradients equal those of one process, at every layout.

    Args:
        model: a tagged model from `build_model`. optimizer_groups: of `parameter_groups`.
        groups: Megatron's ProcessGroupCollection.
    """
    deepspeed = compat.import_deepspeed()
    section = config.optimizer
    optimizer = torch.optim.AdamW(
        [dict(group) for group in optimizer_groups],  # the schedule scales the copies
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=next(model.parameters()).is_cuda and not config.training.offload_optimizer,
    )
    factor = partial(lr_factor, section=section, total_steps=config.training.steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        config=deepspeed_config(config, groups.dp.size(), bf16),
        mpu=make_mpu(groups),
        dist_init_required=False,
    )
    return engine
