"""Make Triton's interpreter round to bf16 as GPUs do.

The interpreter (3.6 and 3.7) truncates an fp32 to bf16 conversion, where every GPU rounds to
nearest even, and mistreats subnormals on the way. A test that compares bits needs the hardware's
rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
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
