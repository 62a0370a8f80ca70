"""How metrics are called where people look at them. Keys that torchtitan logs too have its names and units."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_GIB = 1e9 / 2**30  # of one GB
# key in metrics.jsonl -> (name in TensorBoard and W&B, factor)
SHOWN_AS: dict[str, tuple[str, float]] = {
    "loss": ("loss_metrics/global_avg_loss", 1),
    "grad_norm": ("grad_norm", 1),
    "lr": ("lr", 1),
    "tokens": ("n_tokens_seen", 1),
    "tokens_per_s_per_device": ("throughput(tps)", 1),
    "tflops": ("tflops", 1),
    "mfu": ("mfu(%)", 100),
    "step_s": ("time_metrics/end_to_end(s)", 1),
    "data_wait_share": ("time_metrics/data_loading(%)", 100),
    "memory_active_gb": ("memory/max_active(GiB)", _GIB),
    "memory_active_share": ("memory/max_active(%)", 100),
    "memory_reserved_gb": ("memory/max_reserved(GiB)", _GIB),
    "memory_reserved_share": ("memory/max_reserved(%)", 100),
    "alloc_retries": ("memory/num_alloc_retries", 1),
    "ooms": ("memory/num_ooms", 1),
    "val_loss": ("validation_metrics/loss", 1),
    # ours alone
    "val_bpb": ("validation_metrics/bits_per_byte", 1),
    "val_bpb_by_position": ("validation_metrics/bits_per_byte", 1),
    "val_loss_by_source": ("validation_metrics/loss", 1),
    "val_answers": ("validation_metrics/answers", 1),
    "val_divergence": ("validation_metrics/divergence", 1),
    "memory_gb": ("memory/peak(GB)", 1),
}
# no curves: the axes, a checksum, a forecast, and the wait of rank 0's last step
LEFT_OUT = {"step", "time", "data_crc32", "eta_s", "data_wait_s"}


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    """One log step under the names and in the units that TensorBoard and W&B get, numbers only.

    A list has one name a layer, the mean of its heads; a mapping one name a key.
    """
    values = {name: value for key, x in metrics.items() if key not in LEFT_OUT for name, value in _named(key, x)}
    if "data_wait_share" in metrics and "step_s" in metrics:
        values["time_metrics/data_loading(s)"] = metrics["data_wait_share"] * metrics["step_s"]
    return values


def _named(key: str, value: Any) -> Iterator[tuple[str, float]]:
    name, factor = SHOWN_AS.get(key, (key, 1))
    if isinstance(value, dict):
        parts = [(f"{name}/{part}", x) for part, x in value.items()]
    elif isinstance(value, list):
        name = name.removesuffix("_by_head").removesuffix("_by_layer")
        parts = [(f"{name}/layer_{i:02d}", layer_mean(x)) for i, x in enumerate(value)]
    else:
        parts = [(name, value)]
    yield from ((name, x * factor) for name, x in parts if _is_number(x))


def layer_mean(value: Any) -> Any:
    """Of a layer's heads; a value that is a layer's own is returned as it is."""
    if not isinstance(value, list):
        return value
    numbers = [x for x in value if _is_number(x)]
    return sum(numbers) / len(numbers) if numbers else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
