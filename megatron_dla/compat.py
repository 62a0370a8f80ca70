"""Every shim for megatron-core and DeepSpeed, with its reason.

All act only without CUDA, but for `_keep_fp32_parameters`, which DeepSpeed's bf16 mode needs on CUDA as well, and
`_import_megatron`.
`install()` must run before a Megatron module is built or DeepSpeed is imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

_installed = False


class CpuRngTracker:
    """Megatron's CudaRNGStatesTracker over the CPU generator (megatron-core 0.16.1 has only the CUDA one)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._initialized = False
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def is_initialized(self) -> bool:
        return self._initialized

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self._initialized, self.states_ = True, states

    def add(self, name: str, seed: int) -> None:
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"rng state {name!r} or seed {seed} already exists")
        self._initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        original = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(original)


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random

    device = torch.device("cpu")
    # Megatron allocates with device=torch.cuda.current_device() in many places
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = set_state
    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


@contextlib.contextmanager
def _compiler_when_called() -> Iterator[None]:
    """Inside, `torch.compile` of a function loads the compiler when the function is first called.

    megatron-core decorates its fused functions with it where they are defined, and to load torch's compiler (dynamo,
    inductor, sympy) takes a third of a rank's start, whether or not one of them is ever called.
    """
    real = torch.compile

    def compile(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile, **options)
        if isinstance(function, torch.nn.Module):
            return real(function, **options)
        compiled = functools.cache(lambda: real(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Megatron imports wandb, which takes a second and makes temporary directories that a killed rank leaves behind."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        yield
    finally:
        del sys.modules["wandb"]


def _import_megatron() -> None:
    with _compiler_when_called(), _without_wandb():
        import megatron.core.models.gpt
        import megatron.core.timers  # noqa: F401


def install() -> None:
    """Import megatron-core 0.16.1; without CUDA, make it and DeepSpeed 0.19 run on a CPU and gloo."""
    global _installed
    if _installed:
        return
    _installed = True
    _import_megatron()
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _patch_megatron()


def _keep_fp32_parameters(engine_class: Any) -> None:
    """DeepSpeed 0.19.8 casts every parameter under bf16 (its `keep_in_fp32_modules` is for buffers only): leave those
    marked `keep_fp32`, the scalars of the recurrence, as they are. ZeRO takes a parameter group of another dtype."""
    cast = engine_class._cast_module_mixed_precision
    if hasattr(cast, "keeps_fp32"):
        return

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = {p: p.data for p in self.module.parameters() if getattr(p, "keep_fp32", False)}
        cast(self, *args, **kwargs)
        for parameter, data in kept.items():
            parameter.data = data

    patched.keeps_fp32 = True  # type: ignore[attr-defined]
    engine_class._cast_module_mixed_precision = patched


def import_deepspeed() -> Any:
    """Import DeepSpeed without compiling its shared-memory collective on a CPU (gloo is used), with a quiet logger."""
    import logging

    install()
    with _compiler_when_called():
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

        with contextlib.suppress(ImportError):  # by `deepspeed.initialize` otherwise, and it compiles a function
            import deepspeed.runtime.zero.muon.original_muon

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    _keep_fp32_parameters(deepspeed.DeepSpeedEngine)
    return deepspeed
