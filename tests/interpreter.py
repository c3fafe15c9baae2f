"""Make Triton's interpreter round to bf16 as GPUs do, and spare it most of its work.

The interpreter (3.6 and 3.7) truncates an fp32 to bf16 conversion, where every GPU rounds to
nearest even, and mistreats subnormals on the way. A test that compares bits needs the hardware's
rounding.

A launch replaces the functions of `triton.language` and puts them back, and every call of a
function inside it tries to replace them too; each takes a millisecond for that. Every operation
makes a few types anew, which are those of the operation before; compares those of its operands,
which are mostly the same; and goes through two functions that look for one argument. That is half
of all the interpreter's time.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """All of it, in this process."""
    _round_to_nearest()
    _replace_once()
    _call_at_once()
    _make_types_once()
    _leave_same_types()


def _round_to_nearest() -> None:
    """Replace the interpreter's conversions between fp32 and bf16 by torch's."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = values.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(data, target)
        if (source, target) == (tl.bfloat16, tl.float32):
            bits = np.ascontiguousarray(src.data).view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), target)
        return original(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, cast_impl)


def _replace_once() -> None:
    """Let the first launch, or call inside it, from the same modules replace the functions, for
    good: every kernel of this process is interpreted."""
    original = interpreter._patch_lang
    replaced: set[tuple[bool, bool]] = set()
    # By the module's globals, which are kept: a number is not given twice.
    known: dict[int, tuple[dict[str, Any], tuple[bool, bool]]] = {}

    def replace(fn: Any) -> Any:
        if id(fn.__globals__) not in known:
            values = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            known[id(fn.__globals__)] = fn.__globals__, (tl in values, tl.core in values)
        languages = known[id(fn.__globals__)][1]
        if languages not in replaced:
            replaced.add(languages)
            original(fn)
        return interpreter._LangPatchScope()  # nothing to put back

    interpreter._patch_lang = replace


def _call_at_once() -> None:
    """Give the language's functions their `_semantic` without two functions around each."""

    def replace(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = replace


def _leave_same_types() -> None:
    """Two operands of one type are neither cast nor broadcast."""
    kind = interpreter.TritonSemantic
    convert, broadcast = kind.binary_op_type_checking_impl, kind.broadcast_impl_value

    def converted(
        self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        is_same = type(lhs) is type(rhs) is tl.tensor and lhs.type.name == rhs.type.name
        if is_same and not div_or_mod and not lhs.dtype.is_ptr():
            return lhs, rhs
        return convert(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    kind.binary_op_type_checking_impl = converted
    kind.broadcast_impl_value = broadcasted


def _make_types_once() -> None:
    """Keep what the types of tensors and of their elements are made of, which nothing changes.

    Types with one name are the same type.
    """
    get_dtype = interpreter._get_np_dtype
    dtypes: dict[str, np.dtype[Any]] = {}

    def of_numpy(dtype: Any) -> np.dtype[Any]:
        found = dtypes.get(dtype.name)
        if found is None:
            found = dtypes[dtype.name] = get_dtype(dtype)
        return found

    interpreter._get_np_dtype = of_numpy

    make_block = tl.block_type.__init__
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        known = blocks.get(key)
        if known is not None:
            vars(self).update(known)
            return
        make_block(self, element_ty, shape)
        if all(type(size) is int for size in shape):
            blocks[key] = dict(vars(self))

    tl.block_type.__init__ = block

    make_tensor = tl.tensor.__init__
    tensors: dict[str, dict[str, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = tensors.get(type.name)
        if known is None:
            make_tensor(self, None, type)
            known = tensors[type.name] = dict(vars(self))
        vars(self).update(known)
        self.handle = handle

    tl.tensor.__init__ = tensor

    same = tl.dtype.__eq__

    def equal(self: Any, other: Any) -> bool:
        if type(other) is tl.dtype:
            return bool(self.name == other.name)
        return self is other or same(self, other)

    tl.dtype.__eq__ = equal
