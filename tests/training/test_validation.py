"""Held-out loss over all tokens and by position, against sums by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dla.data.packing import make_batch, pad_row
from megatron_dla.parallel.groups import initialize_distributed
from megatron_dla.training.validation import validate

EOS, T = 2, 96


class Engine:
    """Its loss of a token is the token itself."""

    def __call__(self, tokens, *_, labels, packed_seq_params):
        return tokens.float()

    def eval(self) -> None: ...

    def train(self) -> None: ...


@pytest.mark.parametrize("documents", [True, False])
def test_bits_by_position(documents: bool) -> None:
    initialize_distributed("cpu")
    rng = np.random.default_rng(0)
    windows = [rng.integers(3, 9, n) for n in (T + 1, T + 1, 40)]
    windows[0][[50, 70]] = EOS
    batches = [make_batch([pad_row(w, EOS, T) for w in windows[i : i + 1]], [i]) for i in range(3)]
    size = torch.arange(9.0) % 3 + 1  # bytes of each token
    found = validate(
        Engine(), {"a": batches}, SimpleNamespace(dp_cp=dist.group.WORLD, cp=dist.group.WORLD), torch.device("cpu"),
        lambda _: None, size, positions=lambda batch: batch.positions(documents),
    )  # fmt: skip
    sums: dict[str, list[float]] = {"0-15": [0, 0], "16-31": [0, 0], "32-63": [0, 0], "64-127": [0, 0]}
    for window in windows:
        place = 0
        for token, label in zip(window, window[1:], strict=False):
            name = next(name for name in sums if place <= int(name.split("-")[1]))
            if token != EOS:
                sums[name][0] += token
                sums[name][1] += size[label].item()
            place = 0 if documents and token == EOS else place + 1
    expected = {name: nats / math.log(2) / n for name, (nats, n) in sums.items()}
    assert found["val_bpb_by_position"] == pytest.approx(expected)
    assert found["val_bpb"] == pytest.approx(
        sum(x for x, _ in sums.values()) / math.log(2) / sum(n for _, n in sums.values())
    )
