"""torch's default dtype and default device change nothing.

Under each of them a run gives what it gives under float32 on the CPU, bit for bit. The last test
reads the source: a tensor that is made without a dtype and a device would take those defaults.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum import functional as F
from fusedaccum.rules.as_torch import as_torch
from tests.cases import Gradients, WithoutCompiler, forget_compiled
from tests.tolerances import equal_bits
from tests.tools.test_house import SOURCES

F32, BF16 = torch.float32, torch.bfloat16
DEFAULTS = ["float64", "bfloat16", "float16", "meta"]
PATHS = ["compiled", "blocks", "triton"]
SIZES = (3, 1025)


@contextmanager
def defaults(name: str) -> Iterator[None]:
    """torch's default dtype, or its default device."""
    dtype = torch.get_default_dtype()
    if name == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "blocks":
        WithoutCompiler(monkeypatch)
    yield "triton" if request.param == "triton" else "torch"
    monkeypatch.undo()
    forget_compiled()


def values(seed: int, dtype: torch.dtype = F32) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=F32, device="cpu").to(dtype) for n in SIZES]


def tensors_of(found: Any) -> list[Tensor]:
    """Every tensor in a nest of dicts, lists and numbers."""
    if isinstance(found, Tensor):
        return [found.detach().clone()]
    if isinstance(found, dict):
        return [t for key in sorted(found, key=str) for t in tensors_of(found[key])]
    if isinstance(found, (list, tuple)):
        return [t for member in found for t in tensors_of(member)]
    if isinstance(found, (bool, int, float)):
        return [torch.tensor(float(found), dtype=torch.float64, device="cpu")]
    return []


def assert_the_same(name: str, run: Callable[[], Any]) -> None:
    expected = tensors_of(run())
    with defaults(name):
        got = tensors_of(run())
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            assert equal_bits(a, b)


def train(
    make: Callable[[Any], Any],
    backend: str,
    dtype: torch.dtype = BF16,
    windows: int = 3,
    **options: Any,
) -> Any:
    """Windows of two micro-batches, one of them saved and loaded into a new wrapper half-way."""

    def wrap(model: Gradients) -> FusedAccumOptimizer:
        return FusedAccumOptimizer(
            make(model.parameters()), 2, max_grad_norm=0.5, backend=backend, **options
        )

    model = Gradients(values(0, dtype))
    opt = wrap(model)
    norms = []
    for i in range(2 * windows):
        if i == 3:
            memory = io.BytesIO()
            torch.save([[p.detach() for p in model.params], opt.state_dict()], memory)
            memory.seek(0)
            weights, state = torch.load(memory, weights_only=True)
            model = Gradients(weights)
            opt = wrap(model)
            opt.load_state_dict(state)
        model.backward(values(10 + i, dtype))
        opt.step()
        opt.zero_grad()
        norms.append(None if opt.grad_norm is None else opt.grad_norm.clone())
    parameters = [p.detach() for p in model.params]
    return [parameters, norms, opt.skipped_steps, opt.state_dict()]


FUSED: dict[str, Callable[[Any], Any]] = {
    "adam": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
}


@pytest.mark.parametrize("rule", FUSED)
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_fused_rule(name: str, rule: str, backend: str) -> None:
    assert_the_same(name, lambda: train(FUSED[rule], backend))


@pytest.mark.parametrize("name", DEFAULTS)
def test_many_updates(name: str) -> None:
    """Step counts beyond 256, where bf16 and fp16 count no further."""
    assert_the_same(name, lambda: train(FUSED["adam"], "torch", windows=300))


@pytest.mark.parametrize("name", DEFAULTS)
def test_fp32_masters_and_parameters(name: str, backend: str) -> None:
    masters = {"master_weights": "fp32"}
    assert_the_same(name, lambda: train(FUSED["adam"], backend, **masters))
    assert_the_same(name, lambda: train(FUSED["adam"], backend, F32))


@pytest.mark.parametrize("name", DEFAULTS)
def test_stochastic_rounding(name: str, backend: str) -> None:
    options = {"master_weights": "none", "stochastic_rounding": True}
    assert_the_same(name, lambda: train(FUSED["adam"], backend, **options))


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_native_step(name: str) -> None:
    """Adafactor itself makes its step counts on the default device, so there SGD steps natively;
    and in float64 where that is the default, so numbers are compared as numbers."""

    class Plain(torch.optim.SGD):
        """A subclass has no fused rule."""

    kind = Plain if name == "meta" else torch.optim.Adafactor

    def run() -> Any:
        found = tensors_of(train(lambda params: kind(params, lr=0.1), "torch"))
        return [t if t.dim() else t.double() for t in found]

    assert_the_same(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_rule_made_from_its_text(name: str) -> None:
    """Rprop chooses between numbers, of which torch would make a tensor of the default dtype."""

    def run() -> Any:
        rprop = as_torch("fusedaccum.kernels.rules").rprop
        (param, *_), (grad, *_), (prev, *_), (size, *_) = (values(i) for i in range(4))
        return rprop(param, grad, (prev, size.abs()), (0.3, 1.7, 1e-6, 50.0))

    assert_the_same(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_weights_and_a_short_window(name: str, backend: str) -> None:
    def run() -> Any:
        model = Gradients(values(0, BF16))
        opt = FusedAccumOptimizer(FUSED["adam"](model.parameters()), 3, backend=backend)
        for i, weight in enumerate((3, 5)):
            with opt.micro_batch(weight=weight):
                model.backward(values(i, BF16))
            opt.step()
            opt.zero_grad()
        opt.flush()
        return [[p.detach() for p in model.params], opt.state_dict()]

    assert_the_same(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_functional(name: str, backend: str) -> None:
    def run() -> Any:
        params, grads, *states = (values(i) for i in range(6))
        zeros = [[torch.zeros_like(p) for p in params] for _ in range(4)]
        counts = torch.zeros(2, dtype=F32, device="cpu")
        ones = torch.ones(2, dtype=F32, device="cpu")
        norms = []
        for i in range(4):
            F.accumulate_(states[0], values(20 + i, BF16), 0.3, backend=backend)
            norms += [F.global_norm(states[0], backend=backend), F.global_norm([])]
            F.adamw_(params, grads, *zeros[:2], counts, lr=0.1, backend=backend)
            F.nadam_(params, grads, *zeros[2:], ones, counts, lr=0.1, backend=backend)
            F.sgd_(params, grads, states[1], counts, lr=0.1, momentum=0.9, backend=backend)
        return [params, zeros, counts, ones, states, norms]

    assert_the_same(name, run)


FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty",
    "empty_permuted", "empty_strided", "eye", "full", "hamming_window", "hann_window",
    "kaiser_window", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# These know no dtype, or take their dtype from their name: the default device would be theirs.
LEGACY = {
    "Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor",
    "LongTensor", "ShortTensor", "CharTensor", "ByteTensor", "BoolTensor",
}  # fmt: skip


def careless(text: str) -> list[str]:
    """Tensors that a module makes without saying of which dtype and where.

    A factory that is mentioned without being called, or imported by name, is one as well: nobody
    can see what it is called with. So is `torch.Tensor(...)`.
    """
    tree = ast.parse(text)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names} & FACTORIES
            found += [f"line {node.lineno}: from torch import {name}" for name in sorted(names)]
        if not isinstance(node, ast.Attribute) or ast.unparse(node.value) != "torch":
            continue
        call = called.get(id(node))
        if node.attr in FACTORIES:
            given = {keyword.arg for keyword in call.keywords} if call else set()
            missing = [name for name in ("dtype", "device") if name not in given]
            if missing:
                shown = ast.unparse(call or node)
                found.append(f"line {node.lineno}: {shown} lacks {' and '.join(missing)}")
        elif node.attr in LEGACY and call:
            found.append(f"line {node.lineno}: {ast.unparse(call)} takes no dtype")
    return found


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_every_tensor_is_made_with_a_dtype_and_a_device(module: str) -> None:
    assert careless(SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("torch.zeros(3)", 1),
        ("torch.zeros(3, dtype=a)", 1),
        ("torch.tensor(1.0, device=a)", 1),
        ("torch.as_tensor(array)", 1),
        ("make = torch.zeros if zeroed else torch.empty", 2),
        ("from torch import Tensor, full", 1),
        ("torch.Tensor(3)", 1),
        ("def f(x: torch.Tensor) -> None: ...", 0),
        ("torch.zeros(3, dtype=a, device=b)", 0),
        ("torch.empty_like(x)\ntorch.from_numpy(x)\nx.new_zeros(3)", 0),
    ],
)
def test_a_careless_factory_is_found(text: str, n: int) -> None:
    assert len(careless(text)) == n
