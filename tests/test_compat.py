"""Shims of megatron-core and DeepSpeed that no other test runs through."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_dla import compat

ROOT = Path(__file__).resolve().parents[1]


def test_a_start_does_not_load_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch; real = torch.compile; from megatron_dla import compat; compat.import_deepspeed(); "
        "import megatron_dla.model.gpt, megatron_dla.training.engine, megatron.core; assert torch.compile is real; "
        "print({'torch._inductor', 'torch._dynamo', 'wandb'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "set()\n", done.stderr


def test_what_is_compiled_when_it_is_called() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with compat._compiler_when_called():
        plain = torch.compile(double, backend=backend)
        decorated = torch.compile(backend=backend)(triple)
        module = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    assert not graphs and plain.__name__ == "double" and isinstance(module, torch.nn.Module)
    for function, factor in ((plain, 2.0), (decorated, 3.0)):
        before = len(graphs)
        assert [function(torch.ones(3)).tolist() for _ in range(2)] == [[factor] * 3] * 2
        assert len(graphs) == before + 1
