"""One window's arithmetic, alone."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from fusedaccum.window.weights import Window


def test_a_full_plain_window_needs_no_correction() -> None:
    for n in range(1, 65):
        window = Window(n)
        for i in range(n):
            assert window.is_last is (i == n - 1)
            assert window.scale() == 1 / n
            window.close_micro_batch()
        assert window.correction() == 1.0


def test_the_loops_sum() -> None:
    window = Window(None)
    for _ in range(3):
        assert window.scale() == 1.0
    assert window.correction() == window.correction_so_far(True) == 1.0 and not window.is_last


@given(st.integers(1, 40), st.lists(st.integers(1, 10_000), min_size=1, max_size=40))
def test_weights_are_exact(n: int, weights: list[int]) -> None:
    """scale * correction is w / sum w, to float64's rounding, however many arrived."""
    for window in (Window(n), Window(None)):
        scales = []
        for weight in weights:
            window.weight = float(weight)
            scales.append(window.scale())
            assert window.correction_so_far(True) > 0
            window.close_micro_batch()
        for weight, scale in zip(weights, scales, strict=True):
            exact = Fraction(weight, sum(weights))
            assert abs(Fraction(scale * window.correction()) / exact - 1) < Fraction(1, 2**50)
        window.reset()
        assert window == Window(window.steps)
