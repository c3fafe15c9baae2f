"""The public operations on lists of tensors."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedaccum
from fusedaccum import functional, reference
from fusedaccum.backends import native
from tests import tolerances
from tests.cases import WithoutCompiler, forget_compiled

F = functional


@pytest.mark.parametrize(
    "module", [functional, fusedaccum.optimizer], ids=["functional", "optimizer"]
)
def test_examples_in_docstrings(module: Any) -> None:
    context = {"torch": torch, "FusedAccumOptimizer": fusedaccum.FusedAccumOptimizer}
    result = doctest.testmod(module, extraglobs=context)
    assert result.attempted > 5 and result.failed == 0


@given(
    sizes=st.lists(st.integers(0, 20_000), max_size=5),
    scale=st.floats(-4, 4, width=32),
    first=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_accumulate_(sizes: list[int], scale: float, first: bool, dtype: torch.dtype) -> None:
    accs, grads = [torch.randn(n) for n in sizes], [torch.randn(n).to(dtype) for n in sizes]
    expected = [reference.accumulate(a, g, scale, first) for a, g in zip(accs, grads, strict=True)]
    F.accumulate_(accs, grads, scale, first=first)
    assert all(tolerances.equal_bits(a, e) for a, e in zip(accs, expected, strict=True))


@pytest.mark.parametrize("compiled", [True, False])
def test_layouts(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        WithoutCompiler(monkeypatch)
    acc = torch.randn(6, 4).t()  # dense, not contiguous
    for grad in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 1).expand(4, 6)):
        expected = acc + grad
        F.accumulate_([acc], [grad])
        assert torch.equal(acc, expected)
    sparse = torch.eye(4, 6).to_sparse()
    expected = acc + sparse.to_dense()
    F.accumulate_([acc], [sparse])
    assert torch.equal(acc, expected)
    forget_compiled()


def test_global_norm() -> None:
    tensors = [torch.randn(3, 5), torch.randn(20_000).bfloat16(), torch.randn(9, 2)[:, 0]]
    got = F.global_norm(tensors)
    assert got.shape == () and got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), reference.global_norm(tensors), rtol=tolerances.NORM_RTOL, atol=0
    )
    assert F.global_norm([]).item() == 0.0 and F.global_norm([torch.zeros(0)]).item() == 0.0


def test_updates_are_torchs() -> None:
    """Four updates of each function against the optimizer that it is named after."""
    torch.manual_seed(0)
    start, grads = torch.randn(9000), torch.randn(4, 9000)
    cases: list[tuple[Any, Any, dict[str, Any], int]] = [
        (F.adamw_, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.2}, 2),
        (F.adam_, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.2, "maximize": True}, 2),
        (F.sgd_, torch.optim.SGD, {"lr": 0.1}, 0),
        (F.sgd_, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1),
    ]
    for function, kind, options, n_states in cases:
        theirs = torch.nn.Parameter(start.clone())
        optimizer = kind([theirs], **options)
        ours, states, steps = start.clone(), [torch.zeros(9000)] * 0, torch.zeros(1)
        states = [[torch.zeros(9000)] for _ in range(n_states)] or [None]
        for grad in grads:
            theirs.grad = grad.clone()
            optimizer.step()
            function([ours], [2 * grad], *states, steps, grad_scale=0.5, **options)
        assert steps.item() == 4
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_amsgrad_and_a_tensor_lr() -> None:
    start, grads = torch.randn(50), torch.randn(4, 50)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, amsgrad=True)
    ours, steps = start.clone(), torch.zeros(1)
    states = [[torch.zeros(50)] for _ in range(3)]
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
        F.adamw_(
            [ours], [grad], states[0], states[1], steps, lr=torch.tensor(0.01),
            max_exp_avg_sqs=states[2],
        )  # fmt: skip
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


A, B = torch.zeros(3), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.accumulate_([A], [B]), ValueError, r"grads\[0\] has shape \(4,\)"),
        (lambda: F.accumulate_([A], [A, A]), ValueError, "1 accumulators but 2 grads"),
        (lambda: F.accumulate_(A, [A]), TypeError, "sequence"),
        (lambda: F.accumulate_([A.bfloat16()], [A]), TypeError, "bfloat16; allowed: torch.float32"),
        (lambda: F.accumulate_([A], [A.double()]), TypeError, "float64; allowed"),
        (lambda: F.accumulate_([B[::2]], [B[::2]]), ValueError, "dense"),
        (lambda: F.accumulate_([A], [A.to("meta")]), ValueError, "on meta"),
        (lambda: F.global_norm([A.int()]), TypeError, "int32"),
        (lambda: F.sgd_([A], [A], None, torch.zeros(2), lr=1), ValueError, r"shape \(1,\)"),
        (lambda: F.sgd_([A], [B], None, torch.zeros(1), lr=1), ValueError, "grads"),
        (
            lambda: F.sgd_([A], [A], None, torch.zeros(1), lr=1, momentum=0.9),
            ValueError,
            "needs momentum_buffers",
        ),
        (
            lambda: F.sgd_([A], [A], None, torch.zeros(1), lr=1, masters=[torch.zeros(3)]),
            TypeError,
            "int16 remainders for bf16",
        ),
        (
            lambda: F.adamw_([A], [A], [A.clone()], [B], torch.zeros(1), lr=1),
            ValueError,
            r"exp_avg_sqs\[0\] has shape \(4,\)",
        ),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
    assert not A.any() and not B.any()


def test_versions_move() -> None:
    """Autograd notices that parameters were written."""
    param = torch.zeros(3, requires_grad=True)
    before = param._version
    F.sgd_([param], [torch.ones(3)], None, torch.zeros(1), lr=1.0)
    assert param._version > before


def test_without_a_compiler_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDACCUM_CC", "no-such-compiler")
    forget_compiled()
    native.warn_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="falls back to blocks") as caught:
        for _ in range(2):
            F.accumulate_([torch.zeros(3)], [torch.ones(3).bfloat16()])
    assert len(caught) == 1
    monkeypatch.undo()
    forget_compiled()


def test_a_compiler_that_fails_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FUSEDACCUM_CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_compiled()
    native.load.cache_clear()
    native.warn_missing.cache_clear()
    acc = torch.zeros(3)
    with pytest.warns(RuntimeWarning, match="false failed"):
        F.accumulate_([acc], [torch.ones(3).bfloat16()], 2.0)
    assert acc.tolist() == [2.0] * 3
    assert list((tmp_path / "fusedaccum").iterdir()) == []
    monkeypatch.undo()
    forget_compiled()


def test_large_tensors_run_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than one thread is worth, whatever the test runner gave this process."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    n = native.MIN_PARALLEL_ELEMENTS + 12_345
    acc, grad = torch.randn(n), torch.randn(n).bfloat16()
    expected = reference.accumulate(acc, grad, 0.3, False)
    F.accumulate_([acc], [grad], 0.3)
    assert tolerances.equal_bits(acc, expected)
    norm = F.global_norm([acc])
    torch.testing.assert_close(
        norm.double(), reference.global_norm([acc]), rtol=tolerances.NORM_RTOL, atol=0
    )
