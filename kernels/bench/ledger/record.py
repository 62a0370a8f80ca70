"""Record what runs: every torch operation, Triton launch, host synchronisation and copy, with its bytes and FLOPs.

Tensors are on the `meta` device, which has shapes and no memory, so a step of any size runs in seconds. Numbers that
the code reads on the host (document borders, counts) are kept beside the meta tensor that stands for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import components

# operations that launch nothing on a GPU: views and allocations
FREE = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "as_strided", "detach", "alias", "t", "split", "split_with_sizes", "unbind", "diagonal", "_reshape_alias", "unfold",
    "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size", "flatten",
    "_local_scalar_dense", "view_as_real", "chunk", "expand_as", "narrow", "set_", "resize_",
}  # fmt: skip
WRITES_ONLY = {"zeros", "ones", "full", "zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros",
               "new_full", "new_ones", "arange", "scalar_tensor"}  # fmt: skip
READS_HOST = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique",
              "equal", "is_nonzero")  # fmt: skip
KNOWN_LIMIT = 1 << 20  # elements of a host tensor whose values are kept


@dataclass
class Event:
    """One operation.

    Attributes:
        kind: "op" (a torch kernel), "triton", "sync" (the host waits for the GPU), "copy" (from the host) or
            "collective".
        backward: in a backward pass. micro: between a micro batch's arrival and the end of its backward pass.
        bytes: read + written, each tensor argument once. flops: matrix products only.
        launch: of a Triton launch, what `kernel_cost` needs.
    """

    kind: str
    name: str
    component: str
    backward: bool
    bytes: int = 0
    flops: int = 0
    launch: Any = None
    micro: bool = False

    @property
    def launches(self) -> bool:
        return self.kind in ("op", "triton", "collective")


@dataclass
class Launch:
    """Of one Triton launch: the grid, the arguments by name, the compiled kernel (None if it was not compiled)."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    compiled: Any = None
    report: Any = None

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


@dataclass
class Recording:
    events: list[Event] = field(default_factory=list)
    component_of_node: dict[int, str] = field(default_factory=dict)
    in_micro_batch: bool = False

    def add(self, kind: str, name: str, nbytes: int = 0, flops: int = 0, launch: Any = None) -> None:
        component, backward = self._where()
        if kind == "triton":
            component = components.of_kernel(name, component)
        elif kind == "collective":
            component = components.COMMUNICATION
        component = component or components.OTHER
        self.events.append(Event(kind, name, component, backward, nbytes, flops, launch, self.in_micro_batch))

    def component(self, kernel: str = "") -> str:
        """Component of what runs now; of a launch of a Triton kernel, by its name."""
        found, _ = self._where()
        return (components.of_kernel(kernel, found) if kernel else found) or components.OTHER

    def _where(self) -> tuple[str | None, bool]:
        """Component of what runs now: by the call stack, and in autograd's C++ nodes by that of their forward."""
        found = components.component_of()
        node = torch._C._current_autograd_node()
        if node is None:  # the first gradient, of ones, is the loss's
            return components.LOSS if found == components.AUTOGRAD else found, False
        if found == components.AUTOGRAD:
            return self.component_of_node.get(node._sequence_nr()), True
        return found, True

    def remember_node(self) -> None:
        """The newest autograd node belongs to what runs now; call it in each operation, views included."""
        found = components.component_of()
        if found not in (None, components.AUTOGRAD):
            self.component_of_node[torch._C._autograd._get_sequence_nr() - 1] = found


def nbytes(x: Any) -> int:
    """Bytes of the distinct elements: an expanded tensor is read once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * x.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class _Operations(TorchDispatchMode):
    """Books every operation below autograd."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, space = func._overloadpacket.__name__, func.namespace
        self.recording.remember_node()
        if not any(x.is_meta for x in _tensors((args, kwargs, out))):
            return out
        if space in ("c10d", "_c10d_functional"):
            self.recording.add("collective", name, sum(map(nbytes, _tensors(args))))
        elif name == "_to_copy" and any(not x.is_meta for x in _tensors(args)):
            self.recording.add("copy", name, sum(map(nbytes, _tensors(out))))
        elif name not in FREE:
            self._book(func, name, args, kwargs or {}, out)
        return out

    def _book(self, func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        written = _tensors(out)
        read = [] if name in WRITES_ONLY else _tensors((args, kwargs))
        moved = sum(map(nbytes, written)) + sum(map(nbytes, read))
        if name == "copy_":  # writes its first argument, reads the second
            moved = nbytes(args[0]) + nbytes(args[1])
        flops = 0
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
        self.recording.add("op", name, moved, flops)


class _Fused(torch.autograd.Function):
    """One kernel forward and one backward, as on CUDA, where a meta tensor would take the operation apart."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, name: str, out: Tensor, flops: tuple[int, int], *inputs: Tensor):
        ctx.recording, ctx.name, ctx.flops = recording, name, flops
        ctx.save_for_backward(*inputs)
        recording.add("op", name, sum(map(nbytes, inputs)) + nbytes(out), flops[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        inputs = ctx.saved_tensors
        moved = 2 * sum(map(nbytes, inputs)) + nbytes(grad)
        ctx.recording.add("op", f"{ctx.name}_backward", moved, ctx.flops[1])
        return None, None, None, None, *(torch.empty_like(x) for x in inputs)


def known_values(x: Tensor) -> Tensor | None:
    """The host's copy of a meta tensor's numbers, where there is one."""
    return getattr(x, "known_values", None)


class _Functions(TorchFunctionMode):
    """Answers the host's reads of meta tensors, and keeps operations whole that CUDA has one kernel for."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func is F.rms_norm and x is not None and x.is_meta:
            return self._rms_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention and x is not None and x.is_meta:
            return self._attention(*args, **kwargs)
        if name == "__getitem__" and x is not None and known_values(x) is not None:
            return self._part(func, *args)
        if name in READS_HOST and x is not None and x.is_meta:
            return self._read(name, func, x, args, kwargs)
        out = func(*args, **kwargs)
        if name == "tensor" and isinstance(out, Tensor) and out.is_meta:
            out.known_values = torch.tensor(args[0])  # type: ignore[attr-defined]
            self.recording.add("copy", name, nbytes(out))
        elif name == "to" and x is not None and not x.is_meta and out.is_meta and x.numel() <= KNOWN_LIMIT:
            out.known_values = x.to(out.dtype)
        return out

    def _part(self, func: Any, x: Tensor, index: Any) -> Tensor:
        out, known = func(x, index), known_values(x)
        assert known is not None
        with contextlib.suppress(TypeError, IndexError, RuntimeError):  # an index that is itself a meta tensor
            out.known_values = known[index]  # type: ignore[attr-defined]
        return out

    def _read(self, name: str, func: Any, x: Tensor, args: tuple, kwargs: dict) -> Any:
        self.recording.add("sync", name, nbytes(x))
        known = known_values(x)
        if known is None:
            if x.numel() != 1:
                raise RuntimeError(f"the step reads {tuple(x.shape)} numbers on the host ({name}) that are not known")
            known = torch.ones((), dtype=x.dtype)
        return func(known.view(x.shape), *args[1:], **kwargs)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        inputs = [x] if weight is None else [x, weight]
        return _Fused.apply(self.recording, "rms_norm", torch.empty_like(x.contiguous()), (0, 0), *inputs)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """PyTorch's flash kernel, or with a mask the memory-efficient one, which computes all pairs and reads it."""
        pairs = q.numel() // q.shape[-1] * k.shape[-2]
        products = 2 * pairs * (q.shape[-1] + v.shape[-1])
        if kwargs.get("is_causal"):
            products //= 2
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        inputs = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
        name = "flash_attention" if attn_mask is None else "masked_attention"
        return _Fused.apply(self.recording, name, out, (products, 5 * products // 2), *inputs)


def _grid(grid: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in (grid(arguments) if callable(grid) else grid))
    return (*sizes, *(1,) * (3 - len(sizes)))  # type: ignore[return-value]


def launched(kernel: Any, args: tuple, kwargs: dict, grid: Any, compiled: Any = None, report: Any = None) -> Launch:
    """A launch with its arguments by name."""
    arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    return Launch(kernel, _grid(grid, arguments), arguments, compiled, report)


def argument_bytes(arguments: dict[str, Any]) -> int:
    """Bytes of the tensor arguments, one that is given twice counted once."""
    found = {(id(x.untyped_storage()), x.storage_offset()): nbytes(x) for x in arguments.values() if _is_tensor(x)}
    return sum(found.values())


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


@contextlib.contextmanager
def record(compile_for: int | None = None) -> Iterator[Recording]:
    """Everything that runs inside is recorded; with `compile_for` (80, 90, 100) each kernel is compiled, too."""
    recording = Recording()
    kernels = _compiled(compile_for, recording) if compile_for else _not_compiled(recording)
    with kernels, _Functions(recording), _Operations(recording):
        yield recording


@contextlib.contextmanager
def patched_launches(run: Callable[..., Any]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    stock = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = stock  # type: ignore[method-assign]


@contextlib.contextmanager
def _not_compiled(recording: Recording) -> Iterator[None]:
    """Launches are written down and nothing else; the architecture is Hopper's."""
    from triton.runtime import driver

    from megatron_dla.kernels.aot.compile import stub_driver

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launch = launched(self, args, kwargs, grid)
        recording.add("triton", self.__name__, argument_bytes(launch.arguments), launch=launch)

    active = driver._active
    driver.set_active(stub_driver(90))
    try:
        with patched_launches(run):
            yield
    finally:
        driver._active = active


@contextlib.contextmanager
def _compiled(arch: int, recording: Recording) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    from megatron_dla.kernels.aot.compile import dry_run

    with dry_run(arch, zeroed=False) as reports:
        compiling = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
            kernel = compiling(self, *args, grid=grid, **kwargs)
            report = next((r for r in reports if kernel is not None and r.key == kernel.hash), None)
            launch = launched(self, args, kwargs, grid, kernel, report)
            recording.add("triton", self.__name__, argument_bytes(launch.arguments), launch=launch)
            return kernel

        with patched_launches(run):
            yield
