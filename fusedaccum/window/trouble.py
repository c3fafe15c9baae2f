"""Why the open window cannot be used, from the moment that something goes wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PART = ", so this window holds part of a micro-batch; nothing was updated"
BACKWARD_RAISED = "a backward() raised before it reached all parameters" + PART


class Trouble:
    """What went wrong.

    Attributes:
        reason: in words, None while all is well.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def note(self, reason: str | None) -> None:
        """Remember what went wrong, if anything did; what went wrong first stays."""
        self.reason = self.reason or reason

    @contextmanager
    def unless_done(self, what: str, consequence: str = "") -> Iterator[None]:
        """Change something that must not be left half done: an exception, of any kind and at any
        line, leaves its note behind."""
        before = self.reason
        self.note(f"{what} was interrupted{consequence}")
        yield
        self.reason = before

    def refuse(self, micro_batches: int) -> None:
        """Raise if something went wrong.

        Args:
            micro_batches: how many closed ones zero_grad() would discard.

        Raises:
            RuntimeError: naming what happened and the way out.
        """
        if self.reason is not None:
            raise RuntimeError(
                f"{self.reason}. Call zero_grad() to discard the window ({micro_batches} closed "
                "micro-batches) and go on with the next one"
            )
