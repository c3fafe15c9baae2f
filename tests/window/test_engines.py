"""Engines around the model: DDP is served; those that would train wrong are refused by name.

What runs in several processes is in engine_cases.py; they are started once.
"""

from __future__ import annotations

from collections.abc import Callable
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

FP32_REDUCE = "MixedPrecisionPolicy(reduce_dtype=torch.float32)"

DDP = [
    f"ddp:{order}-{option}-{owner}"
    for order, option, owner in [
        ("before", "plain", "n"), ("before", "plain", "none"), ("after", "plain", "n"),
        ("after", "view", "none"), ("before", "unused", "none"), ("before", "static", "n"),
    ]
]  # fmt: skip
DDP_LATER = [
    f"ddp_later:{option}-{owner}"
    for option in ("plain", "view", "unused", "static")
    for owner in ("n", "none")
]
FSDP1 = [f"fsdp1:{order}-{kind}" for order in ("before", "after") for kind in ("orig", "flat")]
OTHERS = [
    "ddp_part", "ddp_of_others", "norm_by_hand", "fsdp2_before:n", "fsdp2_before:none",
    "fsdp2_late", "tensor_parallel", "functions", "deepspeed:ours", "deepspeed:another",
]  # fmt: skip
ALONE = ["ddp:before-plain-n", "ddp_later:plain-none", "ddp_later:view-n", "fsdp2_before:none"]

Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a case returned in two processes, which agree."""
    return _agreeing(DDP + DDP_LATER + FSDP1 + OTHERS, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a case returned in a group of one process."""
    return _agreeing(ALONE, 1, tmp_path_factory)


def _agreeing(cases: list[str], world: int, factory: pytest.TempPathFactory) -> Results:
    folder = factory.mktemp("group")
    return processes.agreeing(processes.run("tests.engine_cases", cases, world, folder))


# --- DistributedDataParallel; more of it in tests/distributed ---


def _check_written(case: str, result: dict[str, Any]) -> None:
    assert result["unchanged"] and result["right"]
    if "view" in case:
        # DDP itself misses its view in p.grad, after all has arrived here.
        assert "DDP bucket view" in result["backward"] and "raised at its end" in result["step"]
        return
    for text in (result["backward"], result["step"]):
        assert text.startswith("RuntimeError: something else wrote p.grad")
        assert "DistributedDataParallel" in text and "process_group=" in text


@pytest.mark.parametrize("case", DDP)
def test_ddp_is_found_and_served(two: Results, case: str) -> None:
    assert two(case) == {"right": True, "right by hand": True}


@pytest.mark.parametrize("case", DDP_LATER)
def test_ddp_that_comes_later_is_seen_as_it_writes_and_then_served(two: Results, case: str) -> None:
    _check_written(case, two(case))


@pytest.mark.parametrize("case", ALONE[1:3])
def test_ddp_that_comes_later_in_one_process(alone: Results, case: str) -> None:
    _check_written(case, alone(case))


def test_ddp_in_one_process(alone: Results) -> None:
    assert alone(ALONE[0])["right"]


def test_ddp_of_a_part_averages_that_part(two: Results) -> None:
    result = two("ddp_part")
    assert "wrote p.grad" in result["backward"]
    assert result["averaged"] and not result["averaged too"]


def test_ddp_of_another_model_is_not(two: Results) -> None:
    assert two("ddp_of_others")["right"]


def test_all_reduce_alone_is_seen_by_the_norm(two: Results) -> None:
    """torch.distributed.all_reduce moves no version counter."""
    result = two("norm_by_hand")
    assert result["norm"] == pytest.approx(result["exact"], rel=1e-6)
    assert result["off"] < 1e-6  # the update is at most 0.5, rounded in fp32


# --- sharded parameters ---


@pytest.mark.parametrize(
    "case", ["fsdp2_before:n", "fsdp2_before:none", "fsdp2_late", "tensor_parallel"]
)
def test_parameters_replaced_by_dtensors_are_refused(two: Results, case: str) -> None:
    result = two(case)
    assert result["step"].startswith("RuntimeError: no gradient can arrive any more")
    assert "fully_shard" in result["step"] and FP32_REDUCE in result["step"]
    assert result.get("unchanged", True) and result.get("right", True)
    assert result.get("again", result["step"]) == result["step"]


def test_parameters_replaced_in_one_process_are_refused(alone: Results) -> None:
    assert "fully_shard" in alone("fsdp2_before:none")["step"]


@pytest.mark.parametrize("case", FSDP1)
def test_fsdp1_is_refused(two: Results, case: str) -> None:
    text = two(case)["message"]
    assert "FullyShardedDataParallel" in text and FP32_REDUCE in text
    assert text.startswith("TypeError: " if case.endswith("after-flat") else "RuntimeError: ")


def test_functions_refuse_dtensors(two: Results) -> None:
    result = two("functions")
    for text in result.values():
        assert (
            text.startswith("TypeError: ") and "[0] is a DTensor" in text and "to_local()" in text
        )


def test_deepspeed_with_another_optimizer_is_refused(two: Results) -> None:
    """As the Trainer makes one that gets both an optimizer and a config."""
    result = two("deepspeed:another")
    assert result["unchanged"] and "DeepSpeed's engine has parameters" in result["backward"]
    assert "detach()" in result["backward"]
    assert two("deepspeed:ours") == {"backward": None, "unchanged": False}


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
    with pytest.raises(RuntimeError, match=r"wrote p\.grad.*process_group="):
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
