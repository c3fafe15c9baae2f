"""Checkpoints: interchange with plain torch, mid-window resume, refusal of what does not fit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from fusedaccum.integrations import entries
from tests.cases import CASES, Case, Gradients, case_id, small_model
from tests.tolerances import equal_bits

Model = torch.nn.Module


def run(model: Model, opt: Any, start: int, stop: int, dtype: torch.dtype = torch.float32) -> None:
    """Micro-batches `start` to `stop` of a fixed sequence."""
    for i in range(start, stop):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, 7, generator=generator).to(dtype)
        model(x).float().square().mean().backward()
        opt.step()
        opt.zero_grad()


def saved(model: Model, opt: Any) -> tuple[Any, Any]:
    """Through torch.save and a loader that executes nothing."""
    memory = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=True)
    return loaded["model"], loaded["optimizer"]


def assert_same_models(a: Model, b: Model) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert equal_bits(p.detach(), q.detach())


@pytest.mark.parametrize(
    ("dtype", "stop"),
    # A checkpoint between windows holds less: only the accumulators are missing.
    [(torch.float32, 6), (torch.bfloat16, 6), (torch.float16, 6), (torch.bfloat16, 8)],
    ids=["fp32-mid-window", "bf16-mid-window", "fp16-mid-window", "bf16-between-windows"],
)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_resume_is_bit_identical(case: Case, dtype: torch.dtype, stop: int) -> None:
    straight, first = small_model(dtype), small_model(dtype)
    opts = [FusedAccumOptimizer(case.make(m.parameters()), 4) for m in (straight, first)]
    run(straight, opts[0], 0, 14, dtype)
    run(first, opts[1], 0, stop, dtype)
    weights, state = saved(first, opts[1])
    second = small_model(dtype, seed=9)
    opt = FusedAccumOptimizer(case.make(second.parameters()), 4)
    opt.load_state_dict(state)  # before the weights: the order must not matter
    second.load_state_dict(weights)
    assert opt.micro_batches == stop % 4
    run(second, opt, stop, 14, dtype)
    assert_same_models(straight, second)
    opts[0].flush()
    opt.flush()
    assert_same_models(straight, second)


@pytest.mark.parametrize("order", [("torch", "triton"), ("triton", "torch")])
def test_resume_on_the_other_backend(order: tuple[str, str]) -> None:
    straight, first, second = (small_model(torch.bfloat16) for _ in range(3))

    def wrap(model: Model, backend: str) -> FusedAccumOptimizer:
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        return FusedAccumOptimizer(inner, 2, backend=backend)

    opt = wrap(straight, "torch")
    run(straight, opt, 0, 6, torch.bfloat16)
    opt = wrap(first, order[0])
    run(first, opt, 0, 3, torch.bfloat16)
    weights, state = saved(first, opt)
    second.load_state_dict(weights)
    opt = wrap(second, order[1])
    opt.load_state_dict(state)
    run(second, opt, 3, 6, torch.bfloat16)
    assert_same_models(straight, second)


def feed(model: Gradients, opt: Any, start: int, stop: int) -> None:
    """Updates `start` to `stop` with given gradients: a model's own would amplify rounding."""
    for i in range(start, stop):
        generator = torch.Generator().manual_seed(i)
        model.backward([torch.randn(p.shape, generator=generator) for p in model.params])
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_interchange_with_plain_torch(case: Case) -> None:
    """Torch's run continued here, ours continued in torch: one and the same."""
    values = [torch.randn(33, 7), torch.randn(5)]
    models = [Gradients(values) for _ in range(2)]
    plain = case.make(models[0].parameters())
    ours = FusedAccumOptimizer(case.make(models[1].parameters()), 1)
    for source, opt in enumerate((plain, ours)):
        feed(models[source], opt, 0, 3)
        weights, state = saved(models[source], opt)
        model = Gradients([torch.zeros_like(v) for v in values])
        model.load_state_dict(weights)
        other: Any = case.make(model.parameters())
        if opt is plain:
            other = FusedAccumOptimizer(other, 1)
        other.load_state_dict(state)
        feed(model, other, 3, 6)
        feed(models[source], opt, 3, 6)
        for p, q in zip(model.parameters(), models[source].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_wrapping_an_optimizer_with_a_history() -> None:
    ours, theirs = small_model(), small_model()
    for kind, options in (
        (torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5})
    ):  # fmt: skip
        inner, plain = (kind(m.parameters(), lr=0.01, **options) for m in (ours, theirs))
        run(ours, inner, 0, 3)
        run(theirs, plain, 0, 3)
        opt = FusedAccumOptimizer(inner, 1)
        run(ours, opt, 3, 6)
        run(theirs, plain, 3, 6)
        opt.detach()
        run(ours, inner, 6, 8)
        run(theirs, plain, 6, 8)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_states_stay_fp32_on_load() -> None:
    """torch rounds them to the parameter's dtype (pytorch issue 43706)."""
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
    run(model, opt, 0, 4, torch.bfloat16)
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    for i, p in enumerate(model.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            assert equal_bits(opt.state[p][name], state["state"][i][name])
        assert state["state"][i]["master_param"].dtype == torch.float32
    opt.load_state_dict(opt.state_dict())  # Accelerate does this at once
    run(model, opt, 4, 6, torch.bfloat16)


def test_the_format() -> None:
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 4)
    run(model, opt, 0, 5, torch.bfloat16)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups", "fusedaccum"}
    states = {"step", "exp_avg", "exp_avg_sq", "master_param"}
    states |= {"window_micro_batches", "window_is_open"}
    assert set(state["state"][0]) == states | {"window_grad", *entries.NUMBERS}
    extra = state["fusedaccum"]
    assert extra["version"] == 1 and extra["window"]["micro_batches"] == 1
    assert set(extra["accumulators"]) == set(range(8))
    run(model, opt, 5, 8, torch.bfloat16)
    state = opt.state_dict()
    assert state["fusedaccum"]["accumulators"] == {} and set(state["state"][0]) == states


def everything(model: Model, opt: FusedAccumOptimizer) -> list[Tensor]:
    state = opt.state_dict()
    tensors = [v for e in state["state"].values() for v in e.values() if isinstance(v, Tensor)]
    tensors += state["fusedaccum"]["accumulators"].values()
    return [t.detach().clone() for t in [*model.parameters(), *tensors]]


def _edit(state: dict[str, Any], how: str) -> None:
    if how == "groups":
        state["param_groups"].append(state["param_groups"][0])
    elif how == "parameters":
        state["param_groups"][0]["params"].pop()
    elif how == "shape":
        state["state"][2]["exp_avg"] = torch.zeros(4, 4)
    elif how == "master":
        state["state"][2]["master_param"] = torch.zeros(4, 4)
    elif how == "accumulator":
        state["fusedaccum"]["accumulators"][1] = torch.zeros(3)
    elif how == "version":
        state["fusedaccum"]["version"] = 99
    elif how == "window":
        state["fusedaccum"]["gradient_accumulation_steps"] = 3
    elif how == "nothing":
        state.clear()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("groups", "2 param groups, the optimizer 1"),
        ("parameters", "7 parameters in the checkpoint and 8"),
        ("shape", r"exp_avg of parameter 2 has shape \(4, 4\)"),
        ("master", r"master_param of parameter 2 has shape \(4, 4\)"),
        ("accumulator", r"accumulator of parameter 1 has shape \(3,\)"),
        ("version", "version 99"),
        ("window", r"gradient_accumulation_steps=3, this optimizer has 4"),
        ("nothing", "no 'state'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(how: str, words: str) -> None:
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 4)
    run(model, opt, 0, 6, torch.bfloat16)
    state = copy.deepcopy(opt.state_dict())
    run(model, opt, 6, 7, torch.bfloat16)
    before = everything(model, opt)
    _edit(state, how)
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    assert all(equal_bits(a, b) for a, b in zip(before, everything(model, opt), strict=True))
    assert opt.micro_batches == 3


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(how: str) -> None:
    """The model and its optimizer together, in mid-window; the original is not disturbed."""
    model = small_model(torch.bfloat16)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), 4, max_grad_norm=1.0)
    run(model, opt, 0, 6, torch.bfloat16)
    both = {"model": model, "opt": opt}
    copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    other, copied_opt = copied["model"], copied["opt"]
    assert copied_opt.param_groups[0]["params"][0] is next(other.parameters())
    assert copied_opt.micro_batches == 2 and repr(copied_opt) == repr(opt)
    run(other, copied_opt, 6, 9, torch.bfloat16)
    assert opt.micro_batches == 2
    run(model, opt, 6, 9, torch.bfloat16)
    assert_same_models(model, other)


class FusedAdamW(FusedAccumOptimizer):
    """One that takes parameters, for frameworks that make the optimizer themselves."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(torch.optim.AdamW(params, **options))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_subclasses_with_a_constructor_of_their_own_are_copied(how: str) -> None:
    model = small_model(torch.bfloat16)
    opt = FusedAdamW(model.parameters(), lr=0.01)
    run(model, opt, 0, 2, torch.bfloat16)
    both = {"model": model, "opt": opt}
    copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert type(copied["opt"]) is FusedAdamW
    run(model, opt, 2, 4, torch.bfloat16)
    run(copied["model"], copied["opt"], 2, 4, torch.bfloat16)
    assert_same_models(model, copied["model"])


@pytest.mark.parametrize("how", ["deepcopy", "state_dict"])
def test_skipped_updates_are_counted_where_nothing_trains_any_more(how: str) -> None:
    """An optimizer without a rule, whose one parameter is frozen after its first NaN."""
    model = Gradients([torch.ones(3, 2)])
    opt = FusedAccumOptimizer(torch.optim.Adafactor(model.parameters()), 1)
    model.backward([torch.full((3, 2), torch.nan)])
    opt.step()
    model.params[0].requires_grad_(False)
    if how == "deepcopy":
        model, opt = copy.deepcopy((model, opt))
    else:
        state = opt.state_dict()
        model = Gradients([torch.ones(3, 2)]).requires_grad_(False)
        opt = FusedAccumOptimizer(torch.optim.Adafactor(model.parameters()), 1)
        opt.load_state_dict(state)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_loops_open_window_is_saved_and_a_used_one_is_not(weighted: bool) -> None:
    """Frameworks that zero gradients only when the next window starts (Lightning) save before."""

    def micro_batch(model: Gradients, opt: FusedAccumOptimizer, value: float) -> None:
        grads: list[Tensor | None] = [torch.full((3,), value)]
        if weighted:
            with opt.micro_batch(weight=value):
                model.backward(grads)
        else:
            model.backward(grads)

    def made() -> tuple[Gradients, FusedAccumOptimizer]:
        model = Gradients([torch.zeros(3)])
        return model, FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))

    model, opt = made()
    micro_batch(model, opt, 1.0)
    opt.step()
    assert model.params[0].grad is not None
    assert opt.state_dict()["fusedaccum"]["accumulators"] == {}
    opt.zero_grad()
    micro_batch(model, opt, 2.0)
    other, resumed = made()
    for _ in range(2):  # saved again just after it was loaded, as Accelerate does
        weights, state = saved(model, opt)
        assert len(state["fusedaccum"]["accumulators"]) == 1
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        model, opt = other, resumed
        other, resumed = made()
    micro_batch(model, opt, 3.0)
    opt.step()
    # The first update was of 1; then the sum, or the mean weighted with the values themselves.
    expected = -1 - (13 / 5 if weighted else 5.0)
    torch.testing.assert_close(model.params[0].detach(), torch.full((3,), expected))


def test_a_pickle_holds_each_state_once() -> None:
    """States are views of flat buffers, and each would take its whole buffer along."""
    model = Gradients([torch.zeros(1000) for _ in range(20)])
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
    for _ in range(3):
        model.backward([torch.ones(1000) for _ in range(20)])
        opt.step()
    # Parameters, two states, accumulators, and those once more beside the states.
    assert len(pickle.dumps((model, opt))) < 2 * 5 * 4 * 1000 * 20


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_zeros_of_zero_grad_are_used_after_a_resume_too(steps: int | None, how: str) -> None:
    """A parameter without a gradient still decays and moves by its momentum then, as in torch."""
    runs = []
    for resumes in (False, True):
        model = Gradients([torch.ones(3, dtype=torch.bfloat16), torch.ones(2)])
        inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        opt = FusedAccumOptimizer(inner, steps)
        for grads in ([torch.ones(3), torch.ones(2)], [None, torch.ones(2)]):
            for _ in range(steps or 1):
                model.backward(grads)
                opt.step()
                if opt.window_closed:
                    opt.zero_grad(set_to_none=False)
            if resumes and how == "file":
                weights, state = saved(model, opt)
                model = Gradients([torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2)])
                opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), steps)
                model.load_state_dict(weights)
                opt.load_state_dict(state)
            elif resumes:
                model, opt = copy.deepcopy((model, opt))
        assert float(opt.state_dict()["state"][0]["step"]) == 2
        runs.append(model)
    assert_same_models(*runs)


def test_an_optimizer_that_has_not_updated_yet_loads_into_the_plain_one() -> None:
    """Every window so far was skipped, so that there are masters and no states yet."""
    model = Gradients([torch.ones(3, 2, dtype=torch.bfloat16)])
    opt = FusedAccumOptimizer(torch.optim.Adafactor(model.parameters()), 1)
    model.backward([torch.full((3, 2), torch.nan)])
    opt.step()
    plain_model = Gradients([torch.ones(3, 2, dtype=torch.bfloat16)])
    plain = torch.optim.Adafactor(plain_model.parameters())
    for _ in range(2):  # also when it was loaded and saved again
        state = copy.deepcopy(opt.state_dict())
        plain.load_state_dict(state)
        model.backward([torch.ones(3, 2)])  # an update that the load undoes
        opt.step()
        opt.load_state_dict(state)
    plain_model.backward([torch.ones(3, 2)])
    plain.step()


def test_a_weight_without_a_gradient_is_not_loaded_where_another_one_counts() -> None:
    model = Gradients([torch.zeros(3)])
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with opt.micro_batch(weight=5):
        pass
    state = copy.deepcopy(opt.state_dict())
    opt.zero_grad()
    opt.gradient_accumulation_steps = None
    opt.load_state_dict(state)
    model.backward([torch.ones(3)])
    opt.step()
    assert model.params[0].tolist() == [-1.0] * 3


def test_a_native_steps_cleared_states_are_none_in_the_plain_optimizer_too() -> None:
    """Adafactor takes an entry for a complete one; a master alone is none."""
    model = Gradients([torch.ones(3, 2, dtype=torch.bfloat16)])
    opt = FusedAccumOptimizer(torch.optim.Adafactor(model.parameters()), 1)
    model.backward([torch.ones(3, 2)])
    opt.step()
    opt.state.clear()
    plain = torch.optim.Adafactor(Gradients([torch.ones(3, 2).bfloat16()]).parameters())
    plain.load_state_dict(opt.state_dict())
    assert opt.state_dict()["fusedaccum"]["masters"].keys() == {0}
