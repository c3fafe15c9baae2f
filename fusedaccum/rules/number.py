"""What is taken for a number, wherever somebody gives one."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is no number.

    Text and flags are none, though `float()` reads them: they come out of a file or a mask, and
    another number was meant.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return math.ldexp(value, 0)  # exact, and no text
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
