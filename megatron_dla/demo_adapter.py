"""What the demos of δ-mem share: an adapter is trained, exported, and must give its held-out loss on transformers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from megatron_dla.demo import dla
from megatron_dla.metrics.sinks import read_metrics

RUN = Path("runs/demo_delta_mem")
# relative and absolute (nats) difference of the held-out loss, Megatron in that precision against transformers in fp32
RELOADED = {"fp32": (1e-4, 0.0), "bf16": (0.02, 0.01)}


def adapter(config: str, name: str, base: Path, *overrides: str, precision: str = "fp32") -> Path:
    """Train an adapter and export it; its held-out loss must come back from the plain model."""
    dla("run", config, "--nproc", "2", f"run.name={name}", f"training.precision={precision}", *overrides)
    dla("convert", "adapter", str(RUN / name), str(RUN / f"{name}_adapter"), "--overwrite")  # of before a stop
    validated = [m for m in read_metrics(RUN / name / "metrics.jsonl") if "val_loss" in m][-1]
    trained = validated.get("val_answers", validated["val_loss"])
    reloaded = held_out_loss(base, RUN / f"{name}_adapter", RUN / name / "config.yaml")
    print(f"held-out loss in training {trained:.6f}, of the exported adapter on transformers {reloaded:.6f}")
    relative, absolute = RELOADED[precision]
    if not math.isclose(reloaded, trained, rel_tol=relative, abs_tol=absolute):
        sys.exit(f"they differ by more than {relative:g} of it and {absolute:g}: something is wrong with this build")
    return RUN / f"{name}_adapter"


def held_out_loss(base: Path, directory: Path, config_file: Path) -> float:
    """Mean loss over the answers of the run's held-out episodes, in two passes on the transformers model."""
    from megatron_dla.config import AdapterRunConfig, load_config
    from megatron_dla.serving.load import load_adapted
    from megatron_dla.tasks.adapter.task import AdapterTask
    from megatron_dla.tasks.adapter.two_pass import answer_loss

    config = load_config(config_file)
    assert isinstance(config, AdapterRunConfig)
    return answer_loss(load_adapted(base, directory), AdapterTask(config).held_out)
