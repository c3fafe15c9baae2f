"""Make Triton's interpreter round to bf16 as GPUs do, and spare it half of its work.

The interpreter (3.6 and 3.7) truncates an fp32 to bf16 conversion, where every GPU rounds to
nearest even, and mistreats subnormals on the way. A test that compares bits needs the hardware's
rounding.

A launch replaces the functions of `triton.language`, and so does every call of a function inside
it, which finds nothing left to replace and takes a millisecond for that.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Both, in this process."""
    _round_to_nearest()
    _replace_once()


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
    """Let a call inside a launch replace only what no call from the same modules has replaced."""
    original = interpreter._patch_lang
    launch: list[Any] = [interpreter._LangPatchScope()]
    # The interpreter puts back what a launch has replaced, and never what a call inside it has.
    inside: set[tuple[bool, bool]] = set()

    def replace(fn: Any) -> Any:
        values = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        languages = (tl in values, tl.core in values)
        if not launch[0]._changes:
            launch[:] = [original(fn), languages]
            return launch[0]
        if languages == launch[1] or languages in inside:
            return interpreter._LangPatchScope()
        inside.add(languages)
        return original(fn)

    interpreter._patch_lang = replace
