"""torch.distributed.checkpoint, in one process.

It takes "state" and "param_groups" of a state dict and nothing else, renames parameters, and loads
into the tensors of the state dict that it is given.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from fusedaccum import FusedAccumOptimizer
from tests.cases import Case, batches, case_id, loss, small_model
from tests.tolerances import equal_bits
from tests.walk.helpers import Breaks

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"
)


class Native(torch.optim.AdamW):
    """A subclass keeps its own step(): the native path."""


def _case(rule: str, kind: Any, **options: Any) -> Case:
    return Case(rule, kind, tuple(options.items()))


KINDS = [
    _case("adam", torch.optim.AdamW, weight_decay=0.1),
    _case("adam_amsgrad", torch.optim.Adam, amsgrad=True),
    _case("nadam", torch.optim.NAdam),
    _case("asgd", torch.optim.ASGD),
    _case("sgd", torch.optim.SGD),
    _case("sgd_momentum", torch.optim.SGD, momentum=0.9, dampening=0.5),
    _case("none", Native),
]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
every = pytest.mark.parametrize("case", KINDS, ids=case_id)
flat = pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)


def run(model: torch.nn.Module, opt: Any, start: int, stop: int, dtype: torch.dtype) -> None:
    """Micro-batches `start` to `stop` of a fixed sequence, of different token counts."""
    for i in range(start, stop):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(i)).to(dtype)
        with opt.micro_batch(weight=1 + i % 3):
            model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[torch.nn.Module, Any]:
    model = small_model(dtype, seed=seed)
    return model, FusedAccumOptimizer(case.make(model.parameters()), 4, max_grad_norm=1.0)


def assert_goes_on_alike(
    first: tuple[torch.nn.Module, Any], second: tuple[torch.nn.Module, Any], start: int
) -> None:
    dtype = next(first[0].parameters()).dtype
    for model, opt in (first, second):
        run(model, opt, start, 14, dtype)
        opt.flush()
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


@flat
@dtypes
@every
def test_saved_and_loaded_in_place(
    case: Case, dtype: torch.dtype, options: Any, tmp_path: Path
) -> None:
    """The usual recipe: a fresh optimizer's state dict is what the checkpoint is read into."""
    first, second = make(case, dtype), make(case, dtype, seed=9)
    run(*first, 0, 8, dtype)
    weights, states = get_state_dict(*first, options=options)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    weights, states = get_state_dict(*second, options=options)
    assert second[1].micro_batches == 0
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    set_state_dict(*second, model_state_dict=weights, optim_state_dict=states, options=options)
    assert_goes_on_alike(first, second, 8)


@pytest.mark.parametrize(
    ("dtype", "options", "stop"),
    # Every pair of the three.
    [
        (torch.float32, None, 2), (torch.float32, FLAT, 6),
        (torch.bfloat16, None, 6), (torch.bfloat16, FLAT, 2),
    ],
    ids=["fp32-nested-first", "fp32-flat-later", "bf16-nested-later", "bf16-flat-first"],
)  # fmt: skip
@every
def test_mid_window_without_a_template(
    case: Case, dtype: torch.dtype, options: Any, stop: int, tmp_path: Path
) -> None:
    """Through torch.save, and through a DCP that reads all keys: the open window comes along."""
    first = make(case, dtype)
    run(*first, 0, stop, dtype)
    # A first window of plain SGD has no states yet for every parameter.
    states = get_optimizer_state_dict(*first, options=options)
    memory = io.BytesIO()
    torch.save((get_model_state_dict(first[0]), states), memory)
    memory.seek(0)
    dcp.save({"optimizer": states}, checkpoint_id=tmp_path)
    read = _load_state_dict_from_keys({"optimizer"}, checkpoint_id=tmp_path)["optimizer"]
    weights, from_torch = torch.load(memory, weights_only=True)
    resumed = []
    for loaded in (from_torch, read):
        second = make(case, dtype, seed=9)
        second[0].load_state_dict(weights)
        set_optimizer_state_dict(*second, optim_state_dict=loaded, options=options)
        assert second[1].micro_batches == stop % 4
        resumed.append(second)
    assert_goes_on_alike(copy.deepcopy(first), resumed[0], stop)
    assert_goes_on_alike(first, resumed[1], stop)


@flat
def test_a_window_that_a_template_loses_is_an_error(options: Any, tmp_path: Path) -> None:
    first, second = (make(KINDS[0], torch.bfloat16) for _ in range(2))
    run(*first, 0, 6, torch.bfloat16)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(*first, options=options)}, checkpoint_id=tmp_path
    )
    states = get_optimizer_state_dict(*second, options=options)
    dcp.load({"optimizer": states}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"inside a window of 2 micro-batches.*Save between"):
        set_optimizer_state_dict(*second, optim_state_dict=states, options=options)


@pytest.mark.parametrize("owner", [4, None])
@dtypes
@every
def test_asking_for_a_state_dict_disturbs_nothing(
    case: Case, dtype: torch.dtype, owner: int | None
) -> None:
    """It calls step() with zero gradients of an optimizer without states: before the first update,
    in a fresh run, and in an open window whose gradients `model.zero_grad()` has hidden."""
    runs = []
    for asks in (True, False):
        model = small_model(dtype)
        opt = FusedAccumOptimizer(case.make(model.parameters()), owner)
        for i in range(12):
            if asks and i in (0, 1, 2, 5):
                if owner is not None:
                    model.zero_grad()
                before = opt.micro_batches
                get_optimizer_state_dict(model, opt)
                assert opt.micro_batches == before
                assert owner is not None or not any(p.grad is not None for p in model.parameters())
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(i)).to(dtype)
            model(x).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
        runs.append(model)
    for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


def test_detach_leaves_nothing_of_it() -> None:
    model, opt = make(KINDS[0], torch.bfloat16)
    get_optimizer_state_dict(model, opt)
    assert not opt.detach().state


def test_a_first_update_with_lr_zero_is_an_update() -> None:
    """A warm-up that starts at 0 looks alike, but its gradients come from a backward."""
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=0.0), 1)
    model(torch.zeros(4, 7)).mean().mul(0.0).backward()
    opt.step()
    assert opt.window_closed
    assert float(opt.state[model[0].weight]["step"]) == 1


def test_a_window_that_plain_torch_carried_along_is_over() -> None:
    """Loaded into the plain optimizer in mid-window, trained on, and saved from there."""
    model, opt = make(KINDS[0], torch.float32)
    run(model, opt, 0, 6, torch.float32)
    plain_model = small_model()
    plain_model.load_state_dict(model.state_dict())
    plain = KINDS[0].make(plain_model.parameters())
    plain.load_state_dict(opt.state_dict())
    plain_model(torch.ones(2, 7)).sum().backward()
    plain.step()
    again = FusedAccumOptimizer(KINDS[0].make(plain_model.parameters()), 4)
    again.load_state_dict(plain.state_dict())
    assert again.micro_batches == 0
    again.detach()
    plain.zero_grad()
    wrapped = FusedAccumOptimizer(plain, 4)
    assert "window_grad" not in wrapped.state_dict()["state"][0]


def test_another_number_of_steps_differs() -> None:
    """The negative control: the comparison notices one micro-batch."""
    first, second = (make(KINDS[0], torch.bfloat16) for _ in range(2))
    run(*first, 0, 8, torch.bfloat16)
    run(*second, 0, 7, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_goes_on_alike(first, second, 8)


def _backward(model: Any, breaks: bool) -> None:
    hidden = model[0](torch.ones(2, 7))
    with contextlib.suppress(MemoryError):
        model[1:](Breaks.apply(hidden) if breaks else hidden).sum().backward()


@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "half-way"])
@pytest.mark.parametrize("owner", [4, None])
@pytest.mark.parametrize("closed", [0, 1])
@every
def test_asked_for_after_a_backward_that_the_model_zeroed(
    case: Case, closed: int, owner: int | None, breaks: bool
) -> None:
    """Zeros are assigned where the open micro-batch's gradients were: they are none of it."""
    runs = []
    for asks in (True, False):
        model = small_model()
        opt = FusedAccumOptimizer(case.make(model.parameters(), lr=0.1), owner)
        for _ in range(closed if owner else 0):
            _backward(model, False)
            opt.step()
            opt.zero_grad()
        _backward(model, breaks)
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if asks:
                get_optimizer_state_dict(model, opt)
            else:
                opt.zero_grad()
        lost = ["discards the whole window: 1 closed" in str(w.message) for w in caught]
        assert lost == [True] * (closed if owner else 0)
        assert opt.micro_batches == 0 and opt.param_groups[0]["lr"] == 0.1
        for i in range(8):
            loss(model, batches(8)[i]).backward()
            opt.step()
            opt.zero_grad()
        runs.append(model)
    for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


@every
def test_zeros_at_a_rate_of_zero_are_an_update_of_the_loop(case: Case) -> None:
    """A warm-up that starts at 0 looks the same; a backward that raised is refused there."""
    model = small_model()
    opt = FusedAccumOptimizer(case.make(model.parameters(), lr=0.0), 2)
    for i in range(2):
        _backward(model, False)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        assert opt.window_closed == (i == 1)
    opt.zero_grad()
    opt.state.clear()
    _backward(model, True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="raised before it reached"):
        opt.step()
