"""Other packages' optimizers take their own step() on fp32 gradients and masters.

Each does wrapped what it does unwrapped, to the bit: with N = 1 on its gradient, with N = 4 on the
mean of four, in bf16 as an fp32 run whose parameters are rounded to be seen, and after a checkpoint
in mid-window. Those that cannot be right are refused with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import io
import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum.rules.packages import refusal
from tests.tolerances import equal_bits

SHAPES = [(8, 6), (6,), (4, 8)]
LARGE = [(64, 64), (64,)]  # torchao keeps states of fewer than 4,096 elements in fp32


@dataclass(frozen=True)
class Foreign:
    """An optimizer of another package."""

    package: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = tuple(SHAPES)

    @property
    def id(self) -> str:
        named = [f"{name}-{value}" for name, value in self.options if name not in ("lr", "fused")]
        return "-".join([self.package, self.name.lower(), *named])

    def kind(self) -> Any:
        with warnings.catch_warnings():  # deprecations of theirs, at import
            warnings.simplefilter("ignore")
            module = pytest.importorskip(self.package)
            if self.package == "torchao":
                module = importlib.import_module("torchao.optim")
            return getattr(module, self.name)

    def make(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        # Some draw random numbers when they are made.
        torch.manual_seed(6)
        with warnings.catch_warnings():  # "pure low-precision training": the masters are ours
            warnings.simplefilter("ignore")
            return self.kind()(params, **{"lr": 1e-2, **dict(self.options)})


def _foreign(package: str, name: str, **options: Any) -> Foreign:
    shapes = tuple(LARGE if package == "torchao" else SHAPES)
    return Foreign(package, name, tuple(options.items()), shapes)


ON_CPU: dict[str, Any] = {"quantize": False, "master_weight_bits": None, "fused": False}
LISTED = [
    *(_foreign("optimi", name) for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger")),
    _foreign("optimi", "StableAdamW", triton=False),
    _foreign("optimi", "SGD", momentum=0.9),
    _foreign("optimi", "AdamW", kahan_sum=True),
    _foreign("optimi", "AdamW", decouple_lr=True, weight_decay=1e-4),
    *(_foreign("flashoptim", name, **ON_CPU) for name in ("FlashAdam", "FlashAdamW", "FlashLion")),
    *(_foreign("flashoptim", name, momentum=0.9, **ON_CPU) for name in ("FlashSGD", "FlashSGDW")),
    *(_foreign("torchao", name) for name in ("Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8")),
    _foreign("lion_pytorch", "Lion", decoupled_weight_decay=True, weight_decay=0.1),
    _foreign("pytorch_optimizer", "Ranger21", num_iterations=40),
]


def _swept() -> list[Foreign]:
    """Every optimizer of pytorch_optimizer that is made from parameters and a learning rate."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pytorch_optimizer
    except ImportError:
        return []
    found = []
    for name in pytorch_optimizer.get_supported_optimizers():
        kind = pytorch_optimizer.load_optimizer(name)
        entry = _foreign("pytorch_optimizer", kind.__name__)
        if kind.__module__.startswith("torch."):
            continue
        try:
            params = make_params(entry, torch.float32)
            optimizer = entry.make(params)
            if refusal(optimizer) is None:
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
                found.append(entry)
        except Exception:  # needs more than that: a model, roles of parameters, a missing package
            continue
    return found


def make_params(entry: Foreign, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in entry.shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


SWEPT = _swept()
ENTRIES = LISTED + SWEPT
every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)


@pytest.fixture(autouse=True)
def _eager() -> Any:
    """torchao compiles its step; run as written, it is the same function in a hundredth of it."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def micro_gradients(entry: Foreign, i: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in entry.shapes]


def run(entry: Foreign, params: list[torch.nn.Parameter], opt: Any, start: int, stop: int) -> None:
    """Micro-batches `start` to `stop`, wrapped."""
    for i in range(start, stop):
        for param, grad in zip(params, micro_gradients(entry, i), strict=True):
            param.grad = grad.to(param.dtype, copy=True)
        torch.manual_seed(i)  # of those that draw random numbers in step()
        opt.step()
        opt.zero_grad()


def run_plain(
    entry: Foreign, params: list[torch.nn.Parameter], opt: Any, n: int, update: int
) -> None:
    """One update with the mean of `n` micro-gradients."""
    means = [torch.zeros(shape) for shape in entry.shapes]
    for i in range(n * update, n * update + n):
        for mean, grad in zip(means, micro_gradients(entry, i), strict=True):
            mean += grad.float() * (1 / n)  # exact: n is a power of two
    for param, mean in zip(params, means, strict=True):
        param.grad = mean
    torch.manual_seed(n * update + n - 1)
    opt.step()
    opt.zero_grad()


@cache
def calls_blas(kind: Any) -> bool:
    """Whether its file speaks of matrix products and decompositions."""
    words = r"einsum|linalg|matmul|\bmm\(|\bdot\(|norm| @ |shampoo|projector|newton|ortho"
    return re.search(words, inspect.getsource(inspect.getmodule(kind))) is not None


def assert_same(entry: Foreign, ours: Tensor, theirs: Tensor) -> None:
    """To the bit, but for what comes out of BLAS: its order of operations depends on where in
    memory a matrix happens to lie, so that not even two plain runs are always equal."""
    ours, theirs = ours.detach(), theirs.detach()
    if equal_bits(ours, theirs):
        return
    assert calls_blas(entry.kind()), "differs, and calls no BLAS"
    rtol = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-4  # one bf16 step; a few thousand ulps
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)


def wrapped(entry: Foreign, dtype: torch.dtype, n: int) -> tuple[list[torch.nn.Parameter], Any]:
    params = make_params(entry, dtype)
    return params, FusedAccumOptimizer(entry.make(params), n)


# Accumulation is not the optimizer's: it gets an fp32 mean and an fp32 parameter or master anyway.
@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.float32), (4, torch.bfloat16)], ids=["1-fp32", "4-bf16"]
)
@every
def test_wrapped_equals_unwrapped(entry: Foreign, n: int, dtype: torch.dtype) -> None:
    ours, opt = wrapped(entry, dtype, n)
    theirs = make_params(entry, torch.float32)
    plain = entry.make(theirs)
    assert "native step" in repr(opt)
    for update in range(6):
        run(entry, ours, opt, n * update, n * update + n)
        run_plain(entry, theirs, plain, n, update)
        for param, exact in zip(ours, theirs, strict=True):
            assert_same(entry, param, exact.detach().to(dtype))


# In bf16 a checkpoint holds all that it does in fp32, and the masters.
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [*((e, torch.bfloat16) for e in ENTRIES), *((e, torch.float32) for e in LISTED)],
    ids=lambda value: value.id if isinstance(value, Foreign) else str(value).split(".")[1],
)
def test_a_checkpoint_in_mid_window(entry: Foreign, dtype: torch.dtype) -> None:
    ours, opt = wrapped(entry, dtype, 4)
    run(entry, ours, opt, 0, 10)
    memory = io.BytesIO()  # torchao's states know no deepcopy
    torch.save(opt.state_dict(), memory)
    memory.seek(0)
    state = torch.load(memory, weights_only=False)
    resumed, other = wrapped(entry, dtype, 4)
    with torch.no_grad():
        for param, value in zip(resumed, ours, strict=True):
            param.copy_(value)
    other.load_state_dict(state)
    assert other.micro_batches == 2
    run(entry, ours, opt, 10, 20)
    run(entry, resumed, other, 10, 20)
    for param, expected in zip(resumed, ours, strict=True):
        assert_same(entry, param, expected)


@every
def test_another_optimizer_differs(entry: Foreign) -> None:
    """The negative control."""
    ours, opt = wrapped(entry, torch.float32, 1)
    theirs = make_params(entry, torch.float32)
    plain = torch.optim.Rprop(theirs)
    run(entry, ours, opt, 0, 3)
    for update in range(3):
        run_plain(entry, theirs, plain, 1, update)
    assert not any(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_the_sweep_finds_them() -> None:
    pytest.importorskip("pytorch_optimizer")
    names = {entry.name for entry in SWEPT}
    assert len(names) >= 90
    assert names >= {"AdaBelief", "AdEMAMix", "ADOPT", "CAME", "Lamb", "MADGRAD", "Prodigy", "SOAP"}
    assert names >= {"ScalableShampoo", "ScheduleFreeAdamW", "SPAM", "Tiger", "GaLore", "AdaFactor"}


def bf16_params() -> list[torch.nn.Parameter]:
    return make_params(_foreign("", ""), torch.bfloat16)


@pytest.mark.parametrize("bits", [24, 32])
def test_an_optimizer_that_keeps_masters_itself(bits: int) -> None:
    """flashoptim's kernels need a GPU; pytorch_optimizer has the same algorithm in torch.

    It takes the fp32 gradient and keeps its own masters: no second one beside them.
    """
    options = {"master_weight_bits": bits, "quantize": False}
    entry = _foreign("pytorch_optimizer", "FlashAdamW", **options)
    ours, opt = wrapped(entry, torch.bfloat16, 4)
    theirs = make_params(entry, torch.bfloat16)
    for param in theirs:
        param.grad_dtype = None  # lets a bf16 parameter have an fp32 gradient
    plain = entry.make(theirs)
    for update in range(6):
        run(entry, ours, opt, 4 * update, 4 * update + 4)
        run_plain(entry, theirs, plain, 4, update)
        for param, expected in zip(ours, theirs, strict=True):
            assert equal_bits(param.detach(), expected.detach())
            errors = opt.state[param]["error_bits"], plain.state[expected]["error_bits"]
            assert errors[0].any() and torch.equal(*errors)
    assert "master_param" not in opt.state_dict()["state"][0]
    opt.detach()
    with pytest.raises(ValueError, match="keeps the rest of each parameter in its states"):
        FusedAccumOptimizer(plain, master_weights="split")


def test_stochastic_rounding_gets_no_master() -> None:
    entry = _foreign("torchao", "_AdamW", bf16_stochastic_round=True)
    ours, opt = wrapped(entry, torch.bfloat16, 4)
    theirs = make_params(entry, torch.bfloat16)
    for param in theirs:
        param.grad_dtype = None
    plain = entry.make(theirs)
    for update in range(4):
        run(entry, ours, opt, 4 * update, 4 * update + 4)
        run_plain(entry, theirs, plain, 4, update)
        for param, expected in zip(ours, theirs, strict=True):
            assert equal_bits(param.detach(), expected.detach())
    opt.detach()
    with pytest.raises(ValueError, match="rounds parameters stochastically"):
        FusedAccumOptimizer(plain, master_weights="fp32")


AROUND = ["Lookahead", "Magma", "OrthoGrad", "TRAC", "ScheduleFreeWrapper"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ScheduleFreeAdamW", "ScheduleFreeSGD", "ScheduleFreeRAdam"])
def test_schedule_free_train_and_eval(name: str, dtype: torch.dtype) -> None:
    """They move the parameters between two points, of which the states keep one."""
    entry = _foreign("pytorch_optimizer", name)
    ours, opt = wrapped(entry, dtype, 2)
    theirs = make_params(entry, torch.float32)
    plain: Any = entry.make(theirs)
    moved = False
    for update in range(12):  # RAdam's average starts to lag behind after the sixth
        run(entry, ours, opt, 2 * update, 2 * update + 2)
        run_plain(entry, theirs, plain, 2, update)
        if update % 2:
            before = [param.detach().clone() for param in ours]
            for mode in ("eval", "train"):
                getattr(opt, mode)()
                getattr(plain, mode)()
                for param, exact in zip(ours, theirs, strict=True):
                    assert equal_bits(param.detach(), exact.detach().to(dtype))
                moved |= not all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
    assert moved


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in AROUND),
        # TRAC multiplies gradient and parameter, which for it must have one dtype.
        *((name, torch.bfloat16) for name in AROUND if name != "TRAC"),
    ],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_an_optimizer_around_another_goes_around_the_wrapper(name: str, dtype: torch.dtype) -> None:
    entry = _foreign("pytorch_optimizer", name)
    around = entry.kind()
    ours, theirs = (make_params(entry, dtype) for _ in range(2))
    inner, plain = (torch.optim.AdamW(params, lr=1e-2) for params in (ours, theirs))
    with pytest.raises(ValueError, match=rf"{name}\(FusedAccumOptimizer\(AdamW"):
        FusedAccumOptimizer(around(inner))
    opts: list[Any] = [around(FusedAccumOptimizer(inner)), around(plain)]
    if name.startswith("ScheduleFree"):
        for opt in opts:
            opt.train()
    for update in range(6):
        for params, opt in zip((ours, theirs), opts, strict=True):
            for i in (2 * update, 2 * update + 1):
                for param, grad in zip(params, micro_gradients(entry, i), strict=True):
                    half = (grad.float() / 2).to(dtype)
                    param.grad = half if param.grad is None else param.grad + half
            torch.manual_seed(update)
            opt.step()
            opt.zero_grad()
    # In bf16 the plain run has no masters and is coarser: a few steps of 2**-8.
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-5
    for param, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected, rtol=rtol, atol=rtol)


MODEL = torch.nn.Linear(3, 2)
REFUSED = [
    ("pytorch_optimizer", "SAM", {"base_optimizer": torch.optim.SGD}, "second time inside"),
    ("pytorch_optimizer", "LookSAM", {"base_optimizer": torch.optim.SGD}, "second time inside"),
    ("pytorch_optimizer", "FriendlySAM", {"base_optimizer": torch.optim.SGD}, "second time"),
    ("pytorch_optimizer", "BSAM", {"num_data": 10}, "second time inside"),
    ("pytorch_optimizer", "AliG", {}, "from the loss"),
    ("pytorch_optimizer", "AdaHessian", {}, "accumulated ones have no graph"),
    ("pytorch_optimizer", "SophiaH", {}, "accumulated ones have no graph"),
    ("pytorch_optimizer", "LOMO", {"model": MODEL}, "inside the backward"),
    ("pytorch_optimizer", "AdaLOMO", {"model": MODEL}, "inside the backward"),
    ("optimi", "AdamW", {"lr": 0.1, "gradient_release": True}, "inside the backward"),
    ("bitsandbytes.optim", "Adam", {}, "gradient's dtype alone"),
    ("bitsandbytes.optim", "AdamW", {}, "gradient's dtype alone"),
    ("bitsandbytes.optim", "AdamW8bit", {}, "gradient's dtype alone"),
    ("bitsandbytes.optim", "PagedAdamW32bit", {}, "gradient's dtype alone"),
    ("bitsandbytes.optim", "Lion8bit", {}, "gradient's dtype alone"),
    ("bitsandbytes.optim", "SGD", {"lr": 0.1, "momentum": 0.9}, "gradient's dtype alone"),
]


@pytest.mark.parametrize(
    ("package", "name", "options", "words"), REFUSED, ids=[f"{p}-{n}" for p, n, *_ in REFUSED]
)
def test_what_cannot_be_right_is_refused(
    package: str, name: str, options: dict[str, Any], words: str
) -> None:
    kind = getattr(pytest.importorskip(package), name)
    arguments: list[Any] = [] if "model" in options else [bf16_params()]
    optimizer = kind(*arguments, **options)
    with pytest.raises(ValueError, match=words):
        FusedAccumOptimizer(optimizer)
    subclass = type("Mine", (kind,), {})
    with pytest.raises(ValueError, match=words):
        FusedAccumOptimizer(subclass(*arguments, **options))
    for group in optimizer.param_groups:
        for param in group["params"]:  # nothing was changed
            assert param.grad_dtype == param.dtype


def test_flashoptims_gradient_release_is_refused() -> None:
    flashoptim = pytest.importorskip("flashoptim")
    model = torch.nn.Linear(3, 2)
    optimizer = flashoptim.FlashAdamW(model.parameters(), **ON_CPU)
    handle = flashoptim.enable_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="inside the backward"):
        FusedAccumOptimizer(optimizer)
    handle.remove()
    FusedAccumOptimizer(optimizer)


def test_torchaos_cpu_offload_is_refused() -> None:
    """It is made on a GPU only; what is refused is the class."""
    kind = pytest.importorskip("torchao.optim").CPUOffloadOptimizer
    optimizer = kind.__new__(kind)
    optimizer.d_param_groups, optimizer.optim_dict = [{"params": bf16_params()}], {}
    with pytest.raises(ValueError, match="hooks of its own"):
        FusedAccumOptimizer(optimizer)
