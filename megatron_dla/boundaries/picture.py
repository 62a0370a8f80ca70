"""The picture: all heads, and one of them in detail."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_dla.boundaries.collect import Head, Record


def slot_history(head: Head, tokens: int) -> np.ndarray:
    """Number of the slot that holds each token (row) after each token was read (column), -1 before: int [T, T]."""
    held = np.full((tokens, tokens), -1)
    for t in range(tokens):
        for n, (opened, merged) in enumerate(zip(head.start, head.merged, strict=True)):
            if opened <= t < merged:
                held[opened : t + 1, t] = n  # a younger slot writes over the rest of it
    return held


def draw(record: Record, shown: Head, path: Path) -> Path:
    """Write the PNG. Raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap, hsv_to_rgb

    tokens = len(record.tokens)
    figure, axes = plt.subplot_mosaic(
        [["all", "history"], ["size", "weight"]], figsize=(12, 7.5), height_ratios=[3, 1], layout="constrained"
    )
    raster = np.zeros((len(record.heads), tokens))
    for row, head in enumerate(record.heads):
        raster[row, head.start] = 1 + head.layer % 2
    colors = ListedColormap(["white", "tab:orange", "tab:blue"])
    axes["all"].imshow(raster, aspect="auto", interpolation="nearest", cmap=colors, vmin=0, vmax=2)
    axes["all"].set(title="tokens that open a slot (a row is a head)", xlabel="token", ylabel="layer")
    layers = sorted({head.layer for head in record.heads})
    first = [next(i for i, head in enumerate(record.heads) if head.layer == layer) for layer in layers]
    axes["all"].set_yticks(first, [str(layer) for layer in layers])

    held = slot_history(shown, tokens)
    hues = np.array([[(n * 0.381966) % 1, 0.45, 0.9] for n in range(max(1, len(shown.start)))])
    axes["history"].imshow(
        np.ma.masked_less(held, 0), interpolation="nearest", cmap=ListedColormap(hsv_to_rgb(hues)),
        vmin=0, vmax=max(1, len(hues) - 1),
    )  # fmt: skip
    name, counts = f"layer {shown.layer}, head {shown.head}", shown.counts
    axes["history"].set(
        title=f"{name}: {counts['boundaries']} boundaries, {counts['merges']} merges", xlabel="tokens read",
        ylabel="token (a colour is a slot)",
    )  # fmt: skip
    for key, values, label in (
        ("size", shown.size, "tokens in a slot, mean"),
        ("weight", shown.weight, "readout weight, mean"),
    ):
        axes[key].bar(range(len(values)), values, color="tab:gray")
        axes[key].set(xlabel=f"slot of {name}, newest first", ylabel=label)
    figure.savefig(path, dpi=110, format="png")  # whatever the name of the path
    plt.close(figure)
    return path
