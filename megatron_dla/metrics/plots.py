"""Plot a run from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from megatron_dla.errors import UserError
from megatron_dla.metrics.sinks import read_metrics


def plot_run(run_dir: Path) -> Path:
    """Draw loss, bits per byte, boundary rate, learning rate and speed to plots/training.png.

    Raises:
        UserError: the directory has no metrics.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist: give the directory of a run (runs/NAME)")
    try:
        metrics = read_metrics(path)
        steps = [m for m in metrics if m.keys() >= {"step", "loss", "lr", "tokens_per_s"}]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): remove the invalid line") from error
    if not steps:
        raise UserError(f"{str(path)!r} has no training step yet: wait for the first log step")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    x = [m["step"] for m in steps]
    loss, rates, bpb, speed = axes.flat
    loss.plot(x, [m["loss"] for m in steps], label="training", linewidth=1)
    held_out = [m for m in metrics if "val_loss" in m]
    loss.plot([m["step"] for m in held_out], [m["val_loss"] for m in held_out], "o-", label="held out")
    loss.set(title="Loss", xlabel="step", ylabel="nats per token")
    loss.legend()
    by_layer = {m["step"]: m["boundary_rate_by_head"] for m in steps if m.get("boundary_rate_by_head")}
    if by_layer:
        layers = len(next(iter(by_layer.values())))
        for layer in range(layers):
            heads = [m[layer] for m in by_layer.values()]
            mean = [sum(h) / len(h) for h in heads]
            color = plt.get_cmap("viridis")(layer / max(1, layers - 1))
            rates.plot(list(by_layer), mean, label=f"layer {layer}", color=color)
            low, high = [min(h) for h in heads], [max(h) for h in heads]
            rates.fill_between(list(by_layer), low, high, color=color, alpha=0.15)
        rates.legend(fontsize=8)
    rates.set(title="Boundary rate (mean and range of the heads)", xlabel="step", ylabel="share of tokens", ylim=(0, 1))
    measured = [m for m in held_out if "val_bpb" in m]  # not where an adapter is trained
    bpb.plot([m["step"] for m in measured], [m["val_bpb"] for m in measured], "o-", color="tab:red")
    bpb.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    speed.plot(x, [m["tokens_per_s"] for m in steps], color="tab:green", linewidth=1)
    speed.set(title="Speed", xlabel="step", ylabel="tokens per second", ylim=(0, None))
    other = speed.twinx()
    other.plot(x, [m["lr"] for m in steps], color="tab:gray", linestyle="--", linewidth=1)
    other.set_ylabel("learning rate (dashed)")
    figure.suptitle(run_dir.name)
    out = run_dir / "plots" / "training.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out
