"""Warnings that point at the user's loop, however deep in torch or this package they are given."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

INNER = {"fusedaccum", "torch"}


def warn(text: str) -> None:
    """Warn at the innermost line that is neither torch's nor ours: Python shows that line.

    A scheduler replaces `step()` by a function of torch, and hooks run below `backward()`, so that
    no fixed number of frames leads there. A thread of autograd has no such line.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _package(frame) in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=2 if frame is None else level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
