"""The public operations on lists of tensors."""

from __future__ import annotations

import doctest
import inspect
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fusedaccum
from fusedaccum import functional
from fusedaccum.backends import reference
from fusedaccum.backends.compiled import openmp
from fusedaccum.functional import operations, updates
from fusedaccum.rules.builtin import RULES
from tests import tolerances
from tests.cases import WithoutCompiler, forget_compiled

F = functional


@pytest.mark.parametrize(
    "module",
    [operations, updates, fusedaccum.optimizer],
    ids=["operations", "updates", "optimizer"],
)
def test_examples_in_docstrings(module: Any) -> None:
    context = {"torch": torch, "FusedAccumOptimizer": fusedaccum.FusedAccumOptimizer}
    result = doctest.testmod(module, extraglobs=context)
    assert result.attempted > 3 and result.failed == 0


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


def test_a_compiled_caller() -> None:
    """Dynamo went into them, where loops got addresses that it made up."""
    param, acc, m, v, steps = [torch.ones(5)], *([torch.zeros(5)] for _ in range(3)), torch.zeros(1)

    def update(grad: Tensor) -> Tensor:
        F.accumulate_(acc, [grad * 2.0], 0.5)
        F.adamw_(param, acc, m, v, steps, lr=0.1)
        return F.global_norm(acc) * 2.0

    torch._dynamo.reset()
    norm = torch.compile(update, backend="eager")(torch.ones(5))
    assert norm == pytest.approx(2 * 5**0.5) and steps.tolist() == [1.0]
    assert acc[0].tolist() == [1.0] * 5 and param[0].tolist() == pytest.approx([0.899] * 5)


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
    assert F.global_norm([torch.tensor([3.0, 0.0, 4.0]).to_sparse()]).item() == 5.0
    assert F.global_norm([]).item() == 0.0 and F.global_norm([torch.zeros(0)]).item() == 0.0


@dataclass(frozen=True)
class Update:
    """An update function beside the optimizer that it is named after.

    Attributes:
        states: what its states start as, by argument name.
        numbers: what its per-parameter numbers start as, by argument name.
        options: for both; `hyper` for the optimizer and `ours` for the function alone.
    """

    function: Any
    kind: str
    states: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        names = [*self.options, *self.hyper, *self.ours]
        return "-".join([self.function.__name__.rstrip("_"), *(n for n in names if n != "lr")])


MOMENTS = {"exp_avgs": 0.0, "exp_avg_sqs": 0.0}
AMSGRAD = MOMENTS | {"max_exp_avg_sqs": 0.0}
SQUARES, BUFFERS, AVGS = {"square_avgs": 0.0}, {"momentum_buffers": 0.0}, {"grad_avgs": 0.0}
DELTAS, SIZES = SQUARES | {"acc_deltas": 0.0}, {"prevs": 0.0, "step_sizes": 0.01}
PRODUCTS, ETAS = {"mu_products": [1.0]}, {"etas_mus": [0.01, 1.0]}
LR, L2, DECOUPLED = (
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.2},
    {"decoupled_weight_decay": True},
)
UPDATES = [
    Update(F.adamw_, "AdamW", MOMENTS, options=LR),
    Update(F.adamw_, "AdamW", MOMENTS, options=L2 | {"betas": (0.5, 0.9), "eps": 1e-5}),
    Update(F.adamw_, "AdamW", AMSGRAD, options=LR, hyper={"amsgrad": True}),
    Update(F.adam_, "Adam", MOMENTS, options=L2 | {"maximize": True}),
    Update(F.adam_, "Adam", AMSGRAD, options=LR, hyper={"amsgrad": True}),
    Update(F.nadam_, "NAdam", MOMENTS, PRODUCTS, LR),
    Update(F.nadam_, "NAdam", MOMENTS, PRODUCTS, L2 | {"momentum_decay": 0.02}),
    Update(F.nadam_, "NAdam", MOMENTS, PRODUCTS, L2 | DECOUPLED),
    Update(F.radam_, "RAdam", MOMENTS, options=L2),
    Update(F.radam_, "RAdam", MOMENTS, options=L2 | DECOUPLED),
    Update(F.adamax_, "Adamax", {"exp_avgs": 0.0, "exp_infs": 0.0}, options=L2),
    Update(F.adagrad_, "Adagrad", {"state_sums": 0.0}, options=L2 | {"lr_decay": 0.1}),
    Update(
        F.adagrad_, "Adagrad", {"state_sums": 0.5}, options=LR,
        hyper={"initial_accumulator_value": 0.5},
    ),
    Update(F.rmsprop_, "RMSprop", SQUARES, options=L2),
    Update(F.rmsprop_, "RMSprop", SQUARES | BUFFERS, options=LR | {"momentum": 0.9, "alpha": 0.9}),
    Update(F.rmsprop_, "RMSprop", SQUARES | AVGS, options=LR, hyper={"centered": True}),
    Update(
        F.rmsprop_, "RMSprop", SQUARES | AVGS | BUFFERS, options=LR | {"momentum": 0.5},
        hyper={"centered": True},
    ),
    Update(F.adadelta_, "Adadelta", DELTAS, options={"lr": 1.0, "weight_decay": 0.1}),
    Update(F.asgd_, "ASGD", {"axs": 0.0}, ETAS, L2 | {"t0": 3, "lambd": 0.1}),
    Update(F.rprop_, "Rprop", SIZES, hyper=LR),
    Update(
        F.rprop_, "Rprop", SIZES, options={"etas": (0.3, 2.0)},
        hyper=LR | {"step_sizes": (0.004, 0.015)}, ours={"step_size_limits": (0.004, 0.015)},
    ),
    Update(F.sgd_, "SGD", options=L2),
    Update(F.sgd_, "SGD", BUFFERS, options=L2 | {"momentum": 0.9, "dampening": 0.3}),
    Update(F.sgd_, "SGD", BUFFERS, options=LR | {"momentum": 0.9, "nesterov": True}),
    Update(F.lion_, "Lion", {"exp_avgs": 0.0}, options=L2 | {"betas": (0.8, 0.95)}),
]  # fmt: skip
N_UPDATES = 7  # RAdam is rectified from the sixth on


def optimizer_class(name: str) -> Any:
    if name == "Lion":
        return pytest.importorskip("lion_pytorch").Lion
    return getattr(torch.optim, name)


def run_update(update: Update, start: Tensor, grads: Tensor, backend: str | None) -> Tensor:
    """The parameter after its updates, in two tensors whose numbers must not be mixed up."""
    half = len(start) // 3
    split = [half, len(start) - half]
    params = [part.clone() for part in start.split(split)]
    tensors = {
        name: [torch.full_like(p, value) for p in params] for name, value in update.states.items()
    }
    numbers = {
        name: torch.tensor([values] * 2).squeeze(1) for name, values in update.numbers.items()
    }
    steps = torch.zeros(2)
    arguments: dict[str, Any] = {**tensors, **numbers, **update.options, **update.ours}
    if update.function is F.sgd_:
        arguments.setdefault("momentum_buffers", None)
    for grad in grads:
        halved = [2 * part for part in grad.split(split)]
        update.function(params, halved, steps=steps, grad_scale=0.5, backend=backend, **arguments)
    assert steps.tolist() == [len(grads)] * 2
    return torch.cat(params)


@pytest.mark.parametrize("backend", ["torch", "triton", "blocks"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.id)
def test_updates_are_torchs(update: Update, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the optimizer in float64; in compiled loops, in the kernels, and without either."""
    kind = optimizer_class(update.kind)
    start, grads = torch.randn(1500), torch.randn(N_UPDATES, 1500)
    theirs = torch.nn.Parameter(start.double())
    optimizer = kind([theirs], **update.options, **update.hyper)
    moved = torch.zeros(1500, dtype=torch.float64)
    for grad in grads:
        before = theirs.detach().clone()
        theirs.grad = grad.double()
        optimizer.step()
        moved += (theirs.detach() - before).abs()
    if backend == "blocks":
        WithoutCompiler(monkeypatch)
    ours = run_update(update, start, grads, "triton" if backend == "triton" else "torch")
    forget_compiled()
    exact = theirs.detach()
    bound = tolerances.update_bound(exact, moved, 1, N_UPDATES)
    assert ((ours.double() - exact).abs() <= bound).all()


def test_the_updates_differ_from_each_other() -> None:
    """The negative control of the bound above: it tells every two updates apart."""
    start, grads = torch.randn(1500), torch.randn(N_UPDATES, 1500)
    ends = {u.id: run_update(u, start, grads, "torch").double() for u in UPDATES}
    bound = tolerances.update_bound(start.double(), torch.ones(1500).double(), 1, N_UPDATES)
    for (name, a), (other, b) in itertools.combinations(ends.items(), 2):
        assert ((a - b).abs() > bound).any(), (name, other)


def test_every_rule_has_its_function() -> None:
    functions = {u.function.__name__.rstrip("_") for u in UPDATES} - {"adamw"}
    assert functions == {rule.family.name for rule in RULES.values()}
    assert {u.function.__name__ for u in UPDATES} == {
        name for name in F.__all__ if name not in ("accumulate_", "global_norm")
    }


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.id)
def test_defaults_are_torchs(update: Update) -> None:
    """Every hyper-parameter that both have is the same by default; lr has none here."""
    theirs = inspect.signature(optimizer_class(update.kind)).parameters
    ours = inspect.signature(update.function).parameters
    both = (set(theirs) & set(ours)) - {"params", "lr"}
    assert both >= set(update.options) - {"lr", "maximize"}
    for name in both - set(update.states):
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.id)
def test_signatures_name_what_all_updates_share(update: Update) -> None:
    shared = {"maximize": False, "masters": None, "grad_scale": 1.0, "backend": None}
    parameters = list(inspect.signature(update.function).parameters.values())[-4:]
    assert {p.name: p.default for p in parameters} == shared
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)


def test_a_tensor_lr() -> None:
    start, grads = torch.randn(50), torch.randn(4, 50)
    ends = []
    for lr in (0.01, torch.tensor(0.01)):
        params, states, steps = (
            [start.clone()],
            [[torch.zeros(50)] for _ in range(2)],
            torch.zeros(1),
        )
        for grad in grads:
            F.adamw_(params, [grad], *states, steps, lr=lr)
        ends.append(params[0])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


A, B = torch.zeros(3), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.accumulate_([A], [B]), ValueError, r"grads\[0\] has shape \(4,\)"),
        (lambda: F.accumulate_([A], [A, A]), ValueError, "1 accumulators but 2 grads"),
        (lambda: F.accumulate_(A, [A]), TypeError, "sequence"),
        (lambda: F.accumulate_(None, [A]), TypeError, "sequence of tensors, got a NoneType"),
        (lambda: F.accumulate_((a for a in [A]), [A]), TypeError, "got a generator: give a list"),
        (lambda: F.accumulate_({0: A}, [A]), TypeError, "sequence of tensors, got a dict"),
        (lambda: F.accumulate_([A], [None]), TypeError, r"grads\[0\] must be a tensor, got None"),
        (lambda: F.global_norm([0.5]), TypeError, r"tensors\[0\] must be a tensor, got 0.5"),
        (lambda: F.sgd_([A], [A], None, 0.0, lr=1), TypeError, "steps must be one float32 tensor"),
        (
            lambda: F.sgd_([A], [A], None, torch.zeros(1), lr=1, masters=[None]),
            TypeError,
            r"masters\[0\] must be a tensor, got None",
        ),
        (lambda: F.accumulate_([A.bfloat16()], [A]), TypeError, "bfloat16; allowed: torch.float32"),
        (lambda: F.accumulate_([A], [A.double()]), TypeError, "float64; allowed"),
        (lambda: F.accumulate_([B[::2]], [B[::2]]), ValueError, "dense"),
        (lambda: F.accumulate_([A], [A.to("meta")]), ValueError, "on meta"),
        (lambda: F.global_norm([A.int()]), TypeError, "int32"),
        (lambda: F.sgd_([A], [A], None, torch.zeros(2), lr=1), ValueError, r"shape \(1,\)"),
        (lambda: F.sgd_([A], [B], None, torch.zeros(1), lr=1), ValueError, "grads"),
        (
            lambda: F.sgd_([A], [A], None, torch.zeros(1), lr=1, foreach=True),
            TypeError,
            r"^sgd_\(\) got an unexpected keyword argument 'foreach'",
        ),
        (
            lambda: F.nadam_([A], [A], [B], [B], torch.ones(1), torch.zeros(1), lr=1),
            ValueError,
            r"exp_avgs\[0\] has shape \(4,\)",
        ),
        (
            lambda: F.nadam_([A], [A], [A], [A], torch.ones(2), torch.zeros(1), lr=1),
            ValueError,
            r"mu_products must be a contiguous float32 tensor of shape \(1,\)",
        ),
        (
            lambda: F.asgd_([A], [A], [A], torch.ones(1), torch.zeros(1), lr=1),
            ValueError,
            r"etas_mus must be .* shape \(1, 2\)",
        ),
        (
            lambda: F.rmsprop_([A], [A], [A], torch.zeros(1), lr=1, momentum=0.5),
            ValueError,
            "needs momentum_buffers",
        ),
        (
            lambda: F.sgd_([A], [A], None, torch.zeros(1, device="meta"), lr=1),
            ValueError,
            "on meta",
        ),
        (lambda: F.sgd_([A], [A], None, torch.zeros(1), lr=1, masters=[]), ValueError, "masters"),
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
    """Autograd notices what was written, so that no backward uses the new values for the old."""
    param = torch.zeros(3, requires_grad=True)
    acc, buffer, steps, grad = (torch.zeros(n) for n in (3, 3, 1, 3))
    written = [param, acc, buffer, steps]
    before = [tensor._version for tensor in (*written, grad)]
    F.accumulate_([acc], [grad])
    F.sgd_([param], [grad], [buffer], steps, lr=1.0, momentum=0.5)
    moved = [t._version > b for t, b in zip((*written, grad), before, strict=True)]
    assert moved == [True] * 4 + [False]


def test_without_a_compiler_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDACCUM_CC", "no-such-compiler")
    forget_compiled()
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
    acc = torch.zeros(3)
    with pytest.warns(RuntimeWarning, match="false failed"):
        F.accumulate_([acc], [torch.ones(3).bfloat16()], 2.0)
    assert acc.tolist() == [2.0] * 3
    assert list(tmp_path.rglob("*")) == []
    monkeypatch.undo()
    forget_compiled()


def test_large_tensors_run_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than one thread is worth, whatever the test runner gave this process."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    n = openmp.MIN_PARALLEL_ELEMENTS + 12_345
    acc, grad = torch.randn(n), torch.randn(n).bfloat16()
    expected = reference.accumulate(acc, grad, 0.3, False)
    F.accumulate_([acc], [grad], 0.3)
    assert tolerances.equal_bits(acc, expected)
    norm = F.global_norm([acc])
    torch.testing.assert_close(
        norm.double(), reference.global_norm([acc]), rtol=tolerances.NORM_RTOL, atol=0
    )
