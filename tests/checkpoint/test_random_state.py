"""Random state from a file that a tool has edited: taken, or refused by an error that names the file; nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dla.checkpoint.integrity import naming_values
from megatron_dla.checkpoint.manager import _random_state, _set_random_state
from megatron_dla.errors import CheckpointError

VALUES = [-1, 0, 1, 2**31, 2**32, 2**64, 1.5, float("nan"), "x", None, [], {}, True]


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = _random_state()
    yield
    _set_random_state(before)


def edits(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of the state with each of VALUES, or left out; some keys, the places of each tensor."""

    def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
        yield path
        if isinstance(value, dict):
            for key in value:
                yield from places(value[key], (*path, key))
        elif isinstance(value, list):
            for i in range(len(value)) if len(value) < 20 else (0, 5, len(value) - 1):
                yield from places(value[i], (*path, i))

    for path in places(state):
        for value in [*VALUES, "left out"]:
            edited = copy.deepcopy(state)
            if not path:
                edited = value
            else:
                holder = edited
                for key in path[:-1]:
                    holder = holder[key]
                if isinstance(value, str) and value == "left out":
                    del holder[path[-1]]
                else:
                    holder[path[-1]] = value
            yield f"{path} = {value!r}", edited
    for name, tensor in (("numpy", state["numpy"][1]), ("torch", state["torch"])):
        for change in (
            tensor[:-1], tensor[:0], tensor.float(), tensor.bool(), tensor.reshape(1, -1), torch.cat([tensor, tensor]),
            torch.full_like(tensor, 255), tensor.long() - 2**40, tensor.long() + 2**33,
        ):  # fmt: skip
            edited = copy.deepcopy(state)
            if name == "numpy":
                edited["numpy"][1] = change
            else:
                edited["torch"] = change
            yield f"{name} {change.dtype} {tuple(change.shape)}", edited


def test_an_edited_random_state_is_taken_or_refused() -> None:
    state = _random_state()
    kind, internal, gauss = state["python"]
    state["python"] = [kind, list(internal), gauss]
    taken, refused = 0, 0
    for what, edited in edits(state):
        try:
            with naming_values(Path("random_00000.pt")):
                _set_random_state(edited)
        except CheckpointError as error:
            assert "random_00000.pt" in str(error) and len(str(error).splitlines()) == 1, what
            refused += 1
        else:
            taken += 1
            random.random(), np.random.random(2000), torch.rand(2000)  # what was taken can be drawn from
    assert refused > 150 and taken > 10


def test_the_state_comes_back() -> None:
    state = _random_state()
    first = random.random(), np.random.random(), torch.rand(1).item()
    _set_random_state(state)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == first
