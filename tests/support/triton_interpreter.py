"""Triton 3.6.0's CPU interpreter, repaired and made as strict as a GPU where that is cheap.

Repairs: bfloat16 is kept in a numpy bfloat16 array and rounds to nearest even (stock: bit patterns are multiplied,
casts truncate); `for i in range(n)` yields i32 tensors, as compiled code does (stock: Python ints).

Strictness (`poison`, on in the tests): lanes masked off in a `tl.load` without `other` read as NaN or as a huge number,
for a GPU leaves them undefined; an fp32 `tl.dot` whose `input_precision` is "tf32" (the default) drops the mantissa
bits that tensor cores drop; a dot with K < 16 is refused. `reversed_programs` runs the grid backwards: a result that
changes depends on the order of programs, which a GPU does not promise.

Not seen here, see `megatron_dla.kernels.aot`: registers, shared memory, types that a compiler rejects. Not seen
anywhere without a GPU: races between programs and reads out of bounds.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tests.support import interpreter_speed

INTERPRETER = "triton.runtime.interpreter"


def use_interpreter() -> None:
    """Run Triton kernels on the CPU in this process and its children. Call before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    if INTERPRETER in sys.modules:
        install()
    elif not any(isinstance(finder, _InstallOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _InstallOnImport())


class _InstallOnImport(importlib.abc.MetaPathFinder):
    """Installs the patch when triton imports its interpreter, so that tests without kernels do not pay for triton."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != INTERPRETER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_install(module: ModuleType) -> None:
            run(module)
            _patch(module)

        spec.loader.exec_module = run_and_install  # type: ignore[method-assign]
        return spec


def install(poison: bool = True) -> None:
    """Patch the interpreter of this process now; a second call only changes `poison`."""
    import triton.runtime.interpreter as interpreter

    _patch(interpreter)
    interpreter._strict["poison"] = poison


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every grid from the last to the first."""
    import triton.runtime.interpreter as interpreter

    _patch(interpreter)
    interpreter._strict["reverse"] = True
    try:
        yield
    finally:
        interpreter._strict["reverse"] = False


@contextmanager
def loads_counted() -> Iterator[Counter[str]]:
    """Elements that each kernel loads, masked lanes included: programs times steps times lanes."""
    import triton.runtime.interpreter as interpreter

    _patch(interpreter)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, call = builder.create_masked_load, executor.__call__
    counts: Counter[str] = Counter()
    running = [""]

    def counted_load(self: Any, pointers: Any, *rest: Any, **more: Any) -> Any:
        counts[running[0]] += pointers.data.size
        return load(self, pointers, *rest, **more)

    def named_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = self.fn.__name__
        return call(self, *args, **kwargs)

    builder.create_masked_load, executor.__call__ = counted_load, named_call
    try:
        yield counts
    finally:
        builder.create_masked_load, executor.__call__ = load, call


def _patch(interpreter: Any) -> None:
    if hasattr(interpreter, "_strict"):
        return
    interpreter._strict = {"poison": True, "reverse": False, "filled": False}
    _bfloat16(interpreter)
    _memory(interpreter)
    _dot(interpreter)
    _loops(interpreter)
    _programs(interpreter)
    interpreter_speed.install(interpreter)


def _bfloat16(interpreter: Any) -> None:
    import ml_dtypes
    import numpy as np
    from triton import language as tl

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    stock_dtype, builder, Handle = interpreter._get_np_dtype, interpreter.InterpreterBuilder, interpreter.TensorHandle

    def np_dtype(kind: Any) -> np.dtype:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return bfloat16 if element == tl.bfloat16 else stock_dtype(kind)

    stock_cast, stock_float_cast = builder.cast_impl, builder.create_fp_to_fp

    def touches_bfloat16(src: Any, kind: Any) -> bool:
        return tl.bfloat16 in (src.dtype.scalar, kind.scalar)

    def convert(src: Any, kind: Any) -> Any:  # numpy's conversion to bfloat16 rounds to nearest even, like the GPU's
        return Handle(src.data.astype(np_dtype(kind)), kind.scalar)

    def cast(self: Any, src: Any, kind: Any) -> Any:
        return convert(src, kind) if touches_bfloat16(src, kind) else stock_cast(self, src, kind)

    def float_cast(self: Any, src: Any, kind: Any, rounding: Any) -> Any:
        return convert(src, kind) if touches_bfloat16(src, kind) else stock_float_cast(self, src, kind, rounding)

    interpreter._get_np_dtype = np_dtype
    builder.cast_impl, builder.create_fp_to_fp = cast, float_cast
    builder.get_bf16 = lambda self, value: Handle(np.array([value], bfloat16), tl.bfloat16)


def _memory(interpreter: Any) -> None:
    import numpy as np

    builder, Handle, native = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._interpreter

    def raw(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The C++ side knows numpy's own types only: bfloat16 (kind V) goes through as 16-bit integers."""
        return np.ascontiguousarray(data).view(np.uint16) if dtype.kind == "V" else data

    def undefined(dtype: np.dtype) -> Any:
        if interpreter._strict["filled"] or not interpreter._strict["poison"]:
            return 0
        if dtype.kind in "fV":
            return float("nan")
        return True if dtype.kind == "b" else np.iinfo(dtype).max // 2

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        fill = np.full(pointers.data.shape, undefined(dtype), dtype) if other is None else other.data
        fill = raw(fill, dtype)
        return Handle(native.load(pointers.data, mask.data, fill, fill.dtype).view(dtype), kind)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any, **__: Any) -> Any:
        return native.store(pointers.data, raw(value.data, value.data.dtype), mask.data)

    stock_load = interpreter.TritonSemantic._load_legacy

    def load(self: Any, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # a scalar `other` of zero is false as a Python value, and the stock code drops it on the way to `masked_load`
        interpreter._strict["filled"] = other is not None
        return stock_load(self, pointer, mask, other, *rest)

    interpreter.TritonSemantic._load_legacy = load
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def _dot(interpreter: Any) -> None:
    import numpy as np
    from triton import language as tl
    from triton._C.libtriton import ir

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock = builder.create_dot
    dropped = np.uint32(0xFFFFE000)  # tf32 keeps 10 bits of the mantissa

    def operand(x: Any, precision: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return Handle(x.data.astype(np.float32), tl.float32)
        if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32 and interpreter._strict["poison"]:
            bits = np.ascontiguousarray(x.data).view(np.uint32) & dropped
            return Handle(bits.view(np.float32), tl.float32)
        return x

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        return stock(self, operand(a, precision), operand(b, precision), d, precision, *rest)

    builder.create_dot = dot
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda a, b: (1, 1, 16)  # of NVIDIA's 16-bit types


def _loops(interpreter: Any) -> None:
    import numpy as np
    from triton import language as tl

    def kernel_range(*bounds: Any, **_: Any) -> Iterator[Any]:
        """`range` and `tl.range` of a compiled kernel: the variable is a scalar tensor, i64 if a bound is."""
        wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in bounds)
        kind, dtype = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
        plain = [x.handle.data.item() if isinstance(x, tl.tensor) else int(getattr(x, "value", x)) for x in bounds]
        for i in range(*plain):
            yield tl.tensor(interpreter.TensorHandle(np.array([i], dtype), kind), kind)

    def visit_for(self: ast.NodeTransformer, node: ast.For) -> ast.AST:
        call = node.iter
        if isinstance(call, ast.Call):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name == "range":
                call.func = ast.Name(id="_kernel_range", ctx=ast.Load())
        return self.generic_visit(node)

    def item(x: Any) -> int:  # int(array of one element) is an error from numpy 2.4 on
        return int(x.handle.data.item())

    stock = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", item)

    interpreter._kernel_range = kernel_range  # rewritten kernels see the interpreter's globals
    interpreter.ASTTransformer.visit_For = visit_for
    interpreter._patch_lang_tensor = patch_tensor


def _programs(interpreter: Any) -> None:
    stock = interpreter.InterpreterBuilder.set_grid_idx

    def set_program(self: Any, *index: int) -> None:
        if interpreter._strict["reverse"]:
            index = tuple(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True))
        stock(self, *index)

    interpreter.InterpreterBuilder.set_grid_idx = set_program
    # the overflow check of every integer operation is computed and then thrown away unless debugging
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
