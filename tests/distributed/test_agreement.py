"""What processes say of a window to each other, without processes: who looks, and what is mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum.distributed.agreement import Comparison
from fusedaccum.window.weights import Window

SETTINGS: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True}


def table_of(*processes: tuple[Comparison, Window, bool]) -> Tensor:
    """The sum of what all say: each with its window, and whether it has left Join."""
    said = [c.numbers(window, True, is_behind) for c, window, is_behind in processes]
    return torch.from_numpy(sum(said[1:], said[0]))


def test_on_a_gpu_the_host_looks_first_and_after_a_change_here() -> None:
    settings = dict(SETTINGS)
    first, second = (Comparison(lambda: settings, 2, rank) for rank in range(2))
    window, nothing = Window(4, is_explicit=False), Window(4)
    assert first.disagreement(table_of((first, window, False), (second, window, False))) is None
    for again in (window, nothing, window):
        # A meta tensor cannot be read, so this shows that it is not.
        assert first.disagreement(table_of((first, again, False)).to("meta")) is None
    for change in ({"max_grad_norm": 2.0}, {"skip_nonfinite": False}):
        settings.update(SETTINGS | change)
        with pytest.raises(RuntimeError, match="meta"):
            first.disagreement(table_of((first, window, False)).to("meta"))
    settings.update(SETTINGS)
    weighted = table_of((first, Window(4, is_explicit=True), False))
    with pytest.raises(RuntimeError, match="meta"):
        first.disagreement(weighted.to("meta"))


@pytest.mark.parametrize("norms", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (None, None, 2.0)])
@pytest.mark.parametrize("has_left", [False, True])
def test_every_process_finds_the_same(norms: tuple[float | None, ...], has_left: bool) -> None:
    """A process that has left Join says nothing of settings that the others may assign."""
    every = [
        Comparison(lambda norm=norm: SETTINGS | {"max_grad_norm": norm}, 3, rank)  # type: ignore[misc]
        for rank, norm in enumerate(norms)
    ]
    windows = [Window(None, reference=1.0), Window(None, reference=1.0), Window(None, reference=1)]
    table = table_of(*((c, w, has_left) for c, w in zip(every, windows, strict=True)))
    is_mixed = len(set(norms)) > 1 and not has_left
    assert [bool(c.is_mixed(table)) for c in every] == [is_mixed] * 3
    found = {c.disagreement(table) for c in every}
    assert len(found) == 1
    text = found.pop()
    assert (text is not None) is is_mixed
    if is_mixed:
        last = str(norms[2]).removesuffix(".0")
        assert text is not None and f"{last} on rank 2" in text
