"""What `dla bench gpu` runs under compute-sanitizer: one small forward and backward pass of each backbone.

fp32 inputs take the TF32 paths of the chunk-local kernels, the kind in which shared-memory races were found elsewhere
(fla #988, triton #11366); bf16 ones take those of training.
"""

from __future__ import annotations

import torch

from ..dla import dla_attention
from .inputs import TAU, Problem, make_inputs


def main(device: str = "cuda", tokens: int = 512, dim: int = 64) -> None:
    """Run and wait; what is found is the sanitizer's business."""
    for backbone in ("mamba2", "gdn"):
        for dtype in (torch.float32, torch.bfloat16):
            x = make_inputs(Problem(backbone, tokens, dim, 8, 2), 0, dtype=dtype, device=torch.device(device))
            x.require_grad()
            out, _ = dla_attention(*x.arguments(), tau=TAU, capacity=8)
            out.backward(x.dout)
            grads = [y.grad for y in x.arguments() if y is not None]
            if not all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads):
                raise SystemExit(f"{backbone} {dtype}: a gradient is not finite")
    print("done")


if __name__ == "__main__":
    main()
