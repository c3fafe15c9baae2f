"""A form is timed only after it agreed with float64; an inexact one shows its error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..doctor.forms import Form, Stepwise
from ..doctor.judge import SHAPES, judge
from ..doctor.plan import Plan


@dataclass(frozen=True)
class Gate:
    """What a form got wrong.

    Attributes:
        grad_error: relative L2 error of the mean gradient.
        update_error: relative L2 error of what two updates changed.
        seconds: what the check took, with whatever had to be compiled.
    """

    grad_error: float
    update_error: float
    seconds: float = 0.0


def gate(
    kind: type[Form], plan: Plan, like: Tensor, shapes: Sequence[Sequence[int]] = SHAPES
) -> Gate:
    """Check two whole windows, and where there are single operations, two windows of those.

    Args:
        like: dtype and device.
        shapes: of the parameters.

    Raises:
        Wrong: if a form that claims to be exact is not.
    """
    began = time.perf_counter()
    ways = (False, True) if issubclass(kind, Stepwise) else (False,)
    found = [judge(kind, plan, like, shapes, stepwise=stepwise) for stepwise in ways]
    grad_error, update_error = (max(errors) for errors in zip(*found, strict=True))
    return Gate(grad_error, update_error, time.perf_counter() - began)


def is_finite(form: Form) -> bool:
    """Whether neither parameters nor accumulators hold NaN or Inf: a form that skipped its updates
    would have been fast by that."""
    return all(bool(t.isfinite().all()) for t in (*form.params, *form.grads()))
