"""Engines that would train wrong without a word are refused by name, with the way round.

What runs in several processes is in engine_cases.py; they are started once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Variable
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fusedaccum import FusedAccumOptimizer, functional
from tests import processes
from tests.cases import small_model
from tests.tolerances import U

AVERAGE = "gradient_accumulation_steps=None"  # the ways round that messages name
ALL_REDUCE = "torch.distributed.all_reduce(p.grad); p.grad /= world_size"
FP32_REDUCE = "MixedPrecisionPolicy(reduce_dtype=torch.float32)"
DETACH = "detach()"

DDP = [
    f"ddp:{order}-{option}-{owner}"
    for order, option, owner in [
        ("before", "plain", "n"), ("before", "plain", "none"), ("after", "plain", "n"),
        ("after", "view", "none"), ("before", "unused", "none"), ("after", "static", "n"),
    ]
]  # fmt: skip
DDP_LATER = [
    f"ddp_later:{option}-{owner}"
    for option in ("plain", "view", "unused", "static")
    for owner in ("n", "none")
]
FSDP1 = [f"fsdp1:{order}-{kind}" for order in ("before", "after") for kind in ("orig", "flat")]
OTHERS = [
    "ddp_part", "ddp_of_others", "norm_by_hand", "fsdp2_after", "fsdp2_before:n",
    "fsdp2_before:none", "fsdp2_late", "fsdp2_way_round", "tensor_parallel:after",
    "tensor_parallel:before", "functions",
]  # fmt: skip
ALONE = ["ddp:before-plain-n", "ddp_later:plain-none", "ddp_later:view-n", "fsdp2_before:none"]
DEEPSPEED = [
    f"real_deepspeed:{stage}-{owner}"
    for stage in "0123"
    for owner in ("none", "n", "inner", "detached")
]
HAS_DEEPSPEED = find_spec("deepspeed") is not None

Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a case returned in two processes, which agree."""
    cases = DDP + DDP_LATER + FSDP1 + OTHERS + (DEEPSPEED if HAS_DEEPSPEED else [])
    return _agreeing(cases, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a case returned in a group of one process."""
    return _agreeing(ALONE, 1, tmp_path_factory)


def _agreeing(cases: list[str], world: int, factory: pytest.TempPathFactory) -> Results:
    results = processes.run("tests.engine_cases", cases, world, factory.mktemp("group"))

    def of(case: str) -> dict[str, Any]:
        first = results[0][case]
        assert isinstance(first, dict), first
        assert all(result[case] == first for result in results)
        return first

    return of


# --- DistributedDataParallel ---


def _check_ddp(result: dict[str, Any]) -> None:
    for text in (result["backward"], result["step"]):
        assert text.startswith("RuntimeError: ")
        assert "DistributedDataParallel" in text and AVERAGE in text and ALL_REDUCE in text
    assert "zero_grad()" in result["step"]
    assert result["unchanged"] and result["right"]


def _check_written(case: str, result: dict[str, Any]) -> None:
    if "view" not in case:
        _check_ddp(result)
        assert "wrote p.grad" in result["backward"]
        return
    # DDP itself misses its view in p.grad, after all has arrived here.
    assert "DDP bucket view" in result["backward"] and "raised at its end" in result["step"]
    assert result["unchanged"] and result["right"]


@pytest.mark.parametrize("case", DDP)
def test_ddp_is_refused_in_the_first_backward(two: Results, case: str) -> None:
    _check_ddp(two(case))
    assert "wraps parameters" in two(case)["backward"]


@pytest.mark.parametrize("case", DDP_LATER)
def test_ddp_that_comes_later_is_refused_as_it_writes(two: Results, case: str) -> None:
    _check_written(case, two(case))


@pytest.mark.parametrize("case", ALONE[1:3])
def test_ddp_that_comes_later_in_one_process(alone: Results, case: str) -> None:
    _check_written(case, alone(case))


def test_ddp_in_one_process(alone: Results) -> None:
    _check_ddp(alone(ALONE[0]))


def test_ddp_of_a_part_is_refused(two: Results) -> None:
    assert "wrote p.grad" in two("ddp_part")["backward"]


def test_ddp_of_another_model_is_not(two: Results) -> None:
    assert two("ddp_of_others")["right"]


def test_all_reduce_alone_is_seen_by_the_norm(two: Results) -> None:
    """torch.distributed.all_reduce moves no version counter."""
    result = two("norm_by_hand")
    assert result["norm"] == pytest.approx(result["exact"], rel=1e-6)
    assert result["off"] < 1e-6  # the update is at most 0.5, rounded in fp32


# --- sharded parameters ---


@pytest.mark.parametrize("case", ["fsdp2_after", "tensor_parallel:after"])
def test_dtensors_are_refused(two: Results, case: str) -> None:
    text = two(case)["wrap"]
    assert text.startswith("TypeError: param_groups[0]['params'][0] is a DTensor")
    assert FP32_REDUCE in text


@pytest.mark.parametrize(
    "case", ["fsdp2_before:n", "fsdp2_before:none", "fsdp2_late", "tensor_parallel:before"]
)
def test_parameters_replaced_by_dtensors_are_refused(two: Results, case: str) -> None:
    result = two(case)
    assert result["step"].startswith("RuntimeError: no gradient can arrive any more")
    assert "fully_shard" in result["step"] and FP32_REDUCE in result["step"]
    assert result.get("unchanged", True) and result.get("right", True)
    assert result.get("again", result["step"]) == result["step"]


def test_parameters_replaced_in_one_process_are_refused(alone: Results) -> None:
    assert "fully_shard" in alone("fsdp2_before:none")["step"]


def test_the_way_round_for_fsdp2_is_exact(two: Results) -> None:
    assert two("fsdp2_way_round")["right"]


@pytest.mark.parametrize("case", FSDP1)
def test_fsdp1_is_refused(two: Results, case: str) -> None:
    text = two(case)["message"]
    assert "FullyShardedDataParallel" in text and FP32_REDUCE in text
    assert text.startswith("TypeError: " if case.endswith("after-flat") else "RuntimeError: ")


def test_functions_refuse_dtensors(two: Results) -> None:
    result = two("functions")
    for text in result.values():
        assert text.startswith("TypeError: ") and "[0] is a DTensor" in text


# --- tensors that do not own their memory ---


def _fake() -> nn.Parameter:
    with FakeTensorMode():
        return nn.Parameter(torch.ones(3))


def _freed() -> nn.Parameter:
    param = nn.Parameter(torch.ones(3))
    param.data.untyped_storage().resize_(0)
    return param


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_fake, TypeError, "is a FakeTensor"),
        (lambda: nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))), TypeError, "a TwoTensor"),
        (lambda: nn.Parameter(torch._neg_view(torch.ones(3))), TypeError, "resolve_neg"),
        (_freed, ValueError, "has no memory"),
    ],
    ids=["fake", "wrapper-subclass", "negative", "freed"],
)
def test_a_parameter_without_memory_of_its_own(
    make: Callable[[], Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        FusedAccumOptimizer(torch.optim.SGD([make()], lr=0.1))
    with pytest.raises(error, match=words):
        functional.accumulate_([torch.ones(3)], [make().detach()], 1.0)


def test_a_nested_tensor() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
    with pytest.raises(TypeError, match="nested"):
        FusedAccumOptimizer(torch.optim.SGD([nested], lr=0.1))


def test_a_partition_of_zero_3() -> None:
    param = nn.Parameter(torch.ones(3))
    param.ds_id = 0  # type: ignore[attr-defined]  # as deepspeed.zero.Init marks them
    with pytest.raises(TypeError, match=r"ZeRO-3.*detach\(\)"):
        FusedAccumOptimizer(torch.optim.SGD([param], lr=0.1))


class _Tagged(nn.Parameter):
    """A subclass with memory like any other's."""


def test_a_subclass_with_memory_of_its_own_is_served() -> None:
    param = _Tagged(torch.ones(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.5))
    param.sum().backward()
    opt.step()
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


# --- writers, and hooks that are none ---


def _write(model: nn.Module) -> None:
    for param in model.parameters():
        if param.grad is not None:
            param.grad.fill_(7.0)


def _assign(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.zeros_like(param)


@pytest.mark.parametrize(
    ("act", "steps"),
    [(_write, None), (_write, 2), (_assign, None), (_assign, 2), (nn.Module.zero_grad, 2)],
)
def test_who_writes_gradients_at_the_end_of_a_backward_is_refused(
    act: Callable[[nn.Module], None], steps: int | None
) -> None:
    """An engine of any kind: it queues its writing when a gradient arrives."""
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), steps)
    first = next(model.parameters())
    handle = first.register_post_accumulate_grad_hook(
        lambda _: Variable._execution_engine.queue_callback(lambda: act(model))
    )
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"wrote p\.grad.*all_reduce"):
        sum(p.sum() for p in model.parameters()).backward()
    with pytest.raises(RuntimeError, match=r"wrote p\.grad.*zero_grad"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    handle.remove()
    opt.zero_grad()
    for _ in range(steps or 1):
        sum(p.sum() for p in model.parameters()).backward()
        opt.step()
    assert all(torch.equal(p, b - 0.5) for p, b in zip(model.parameters(), before, strict=True))


def test_who_takes_gradients_away_is_refused() -> None:
    """Gradient release: an optimizer step in a hook."""
    param = nn.Parameter(torch.ones(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([param], lr=0.5), 2)

    def release(p: Tensor) -> None:
        p.grad = None

    handle = param.register_post_accumulate_grad_hook(release)
    with pytest.raises(RuntimeError, match=r"was taken away.*detach\(\)"):
        param.sum().backward()
    with pytest.raises(RuntimeError, match="was taken away"):
        opt.step()
    assert torch.equal(param.detach(), torch.ones(3))
    handle.remove()
    opt.zero_grad()
    for _ in range(2):
        param.sum().backward()
        opt.step()
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


class Layers(nn.Module):
    """A tied layer, called plainly or under a checkpoint, and hooks of a user on everything."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            if self.reentrant is None:
                x = self.tied(x)
            else:
                x = checkpoint(self.tied, x, use_reentrant=self.reentrant)
        return self.last(x).sum()  # type: ignore[no-any-return]


def _triple(param: Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(3)


def _hook_all(model: nn.Module) -> list[str]:
    seen: list[str] = []
    for param in model.parameters():
        param.register_hook(lambda g: seen.append("tensor") or 2 * g)  # type: ignore[func-returns-value]
        param.register_post_accumulate_grad_hook(_triple)
    for module in model.children():
        module.register_full_backward_hook(lambda *_: seen.append("module"))
    return seen


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_hooks_of_users_are_no_writers(reentrant: bool | None, steps: int | None) -> None:
    """They scale each fresh gradient by 6. Two backwards make a micro-batch."""
    model, plain = Layers(reentrant).double().float(), Layers(None)
    plain.load_state_dict(model.state_dict())
    seen = _hook_all(model)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), steps)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for window in range(2):
        for i in range(2):
            for half in range(2):
                x = torch.ones(2, 4) * (window + i - half)
                model(x.requires_grad_()).backward()
                (6 * plain(x) / (steps or 1)).backward()
            if steps is not None:
                opt.step()
                opt.zero_grad()
        if steps is None:
            opt.step()
            opt.zero_grad()
        reference.step()
        reference.zero_grad()
    assert {"tensor", "module"} <= set(seen)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- engines that take the optimizer over ---

_ENGINE = """
class DeepSpeedEngine(__import__("torch").nn.Module):
    def __init__(self, model, optimizer, zero):
        super().__init__()
        self.module = model
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        self.optimizer = optimizer if zero is None else zero(optimizer)
"""
# What ZeRO does to a client optimizer: flat fp32 partitions take the parameters' place.
_ZERO = """
import torch

class DeepSpeedZeroOptimizer:
    def __init__(self, optimizer):
        self.optimizer, self.params = optimizer, []
        for group in optimizer.param_groups:
            self.params += group["params"]
            flat = torch.cat([p.detach().flatten().float() for p in group["params"]])
            group["params"] = [torch.nn.Parameter(flat)]

    def step(self):
        flat = self.optimizer.param_groups[0]["params"][0]
        flat.grad = torch.cat([p.grad.flatten().float() for p in self.params])
        self.optimizer.step()
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, flat.detach().split(sizes)):
            p.data.copy_(part.view_as(p))
"""


def _module(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> Any:
    """A module made of `text`, as if it were installed."""
    module = ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module(monkeypatch, "deepspeed.runtime.engine", _ENGINE).DeepSpeedEngine


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module(
        monkeypatch, "deepspeed.runtime.zero.stage_1_and_2", _ZERO
    ).DeepSpeedZeroOptimizer


def _unchanged_and_usable(model: nn.Module, opt: FusedAccumOptimizer, before: list[Tensor]) -> None:
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for _ in range(opt.gradient_accumulation_steps or 1):
        sum(p.sum() for p in model.parameters()).backward()
        opt.step()
    assert all(torch.equal(p, b - 0.5) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("steps", [None, 2])
def test_zero_is_refused_as_it_starts(engine: Any, zero: Any, steps: int | None) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), steps)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*detach\(\).*grad_accum_dtype"):
        engine(model, opt, zero)
    _unchanged_and_usable(model, opt, before)


def test_stage_0_is_refused_where_two_count(engine: Any) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"steps=2\) counts.*DeepSpeed.*steps=None"):
        engine(model, opt, None)
    _unchanged_and_usable(model, opt, before)


def test_stage_0_is_served_where_deepspeed_counts(engine: Any) -> None:
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    before = [p.detach().clone() for p in model.parameters()]
    assert engine(model, opt, None).optimizer is opt
    _unchanged_and_usable(model, opt, before)


def test_offload_of_accelerate_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes an optimizer of its own of our param groups, and drops ours."""
    text = "def map_pytorch_optim_to_deepspeed(optimizer):\n    return list(optimizer.param_groups)"
    module = _module(monkeypatch, "accelerate.utils.deepspeed", text)
    opt = FusedAccumOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.5))
    with pytest.raises(RuntimeError, match=r"DeepSpeed.*detach\(\)"):
        module.map_pytorch_optim_to_deepspeed(opt)


@pytest.mark.parametrize("inner", [False, True], ids=["wrapper", "wrapped"])
def test_an_engine_of_any_name_that_exchanges_parameters(
    monkeypatch: pytest.MonkeyPatch, inner: bool
) -> None:
    zero = _module(monkeypatch, "shardlib", _ZERO).DeepSpeedZeroOptimizer
    model = small_model()
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    sharded = zero(opt.optimizer if inner else opt)
    for call in (lambda: sum(p.sum() for p in params).backward(), opt.step):
        with pytest.raises(RuntimeError, match=r"replaced in param_groups.*detach\(\)"):
            call()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert sharded.params == params
    opt.param_groups[0]["params"] = params
    opt.zero_grad()
    _unchanged_and_usable(model, opt, before)


def test_the_schedule_of_deepspeed_may_read_param_groups(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def rates(optimizer):\n    return [g['lr'] for g in optimizer.param_groups]"
    schedules = _module(monkeypatch, "deepspeed.runtime.lr_schedules", text)
    opt = FusedAccumOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.5), 2)
    assert schedules.rates(opt) == [0.5]


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeed_itself(two: Results, case: str) -> None:
    stage, owner = case.split(":")[1].split("-")
    result = two(case)
    if owner == "detached" or (stage, owner) == ("0", "none"):
        # Both divide in an order of their own; the weights are at most 100.
        assert result["message"] is None and result["off"] < 100 * 16 * U
    else:
        assert result["message"].startswith("RuntimeError: ") and DETACH in result["message"]
        assert ("initialized" in result) == (owner == "inner")
