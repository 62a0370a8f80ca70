"""megatron-dla: pretraining with Dynamic Linear Attention on Megatron-Core and DeepSpeed."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# `kernels/`, `launch/` and `data_prep/` are top-level folders but import as `megatron_dla.kernels` etc.
# An installed wheel has them inside the package; a bare checkout finds them through this path entry.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "dla").is_dir():
    __path__.append(str(_here.parent))
