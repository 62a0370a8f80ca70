"""An optimizer update that is left out where all ranks decide so, at every ZeRO stage.

DeepSpeed's ZeRO optimizers ask `is_invalid_grad_norm(norm)` once an update, with the norm over all ranks, and then drop
the gradients without touching weights and moments. That question is answered here. At stage 0 in fp32 there is no such
question and the gradients are applied whatever they are: torch's optimizer is held back instead.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

ASKING = ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3")


class Update:
    """The update of one step.

    Args:
        engine: a DeepSpeed engine. drops: gradient norm (nan: not finite) -> whether the update is left out. The same
            on every rank; called once.

    Attributes:
        norm: of the gradient before clipping, nan where it is not finite. dropped: what `drops` said.
    """

    def __init__(self, engine: Any, drops: Callable[[float], bool]) -> None:
        self.engine, self._drops = engine, drops
        self.norm, self.dropped, self._asked = math.nan, False, False

    def apply(self) -> None:
        """`engine.step()` at the border of a step, and the learning rate schedule's, which counts every step."""
        with self._held_back() if not hasattr(self.engine.optimizer, "optimizer") else self._asking():
            self.engine.step()
        if not self._asked:  # bf16 at ZeRO-2 looks for overflows before it computes the norm
            self._ask(math.nan)
        if self.dropped:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch: the schedule moves before the first update
                self.engine.lr_scheduler.step()

    def _ask(self, norm: Any) -> bool:
        value = float(norm)
        self.norm = value if math.isfinite(value) and value >= 0 else math.nan  # DeepSpeed also says -1 or inf
        self.dropped, self._asked = self._drops(self.norm) or math.isnan(self.norm), True
        return self.dropped

    @contextmanager
    def _asking(self) -> Iterator[None]:
        modules = [importlib.import_module(f"deepspeed.runtime.{name}") for name in ASKING]
        patches = [patch.object(module, "is_invalid_grad_norm", self._ask) for module in modules]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    @contextmanager
    def _held_back(self) -> Iterator[None]:
        from deepspeed.runtime.utils import clip_grad_norm_

        engine, optimizer = self.engine, self.engine.optimizer
        limit, step = engine.gradient_clipping(), optimizer.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            norm = clip_grad_norm_(list(engine.module.parameters()), limit or math.inf, mpu=engine.mpu)
            optimizer.overflow = self._ask(norm)  # the engine then holds its schedule back, as ZeRO's
            return None if optimizer.overflow else step(*args, **kwargs)

        with patch.object(engine, "clip_fp32_gradients", lambda: None), patch.object(optimizer, "step", stepped):
            yield
