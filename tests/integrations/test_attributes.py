"""What is assigned to an attribute of the wrapper acts, or is refused, or is somebody's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedaccum import FusedAccumOptimizer
from tests.loops import give, one, sgd


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_grad_nrom", "max_grad_norm"),
        ("max_norm", "max_grad_norm"),
        ("accumulation_steps", "gradient_accumulation_steps"),
        ("skip_non_finite", "skip_nonfinite"),
    ],
)
def test_nearly_the_name_of_a_setting_is_refused(name: str, meant: str) -> None:
    """It was kept beside the settings, and nothing acted by it."""
    opt = sgd(one(), n=2)
    with pytest.raises(AttributeError, match=rf"{name}=8 would.*Did you mean {meant}\?"):
        setattr(opt, name, 8)
    assert not hasattr(opt, name)


@pytest.mark.parametrize("name", ["name", "lr", "max_steps", "skipped_iter", "_max_grad_norms"])
def test_others_may_have_attributes_of_their_own(name: str) -> None:
    opt = sgd(one())
    for value in (1, 2):
        setattr(opt, name, value)
        assert vars(opt)[name] == value and not hasattr(opt.optimizer, name)


def test_so_may_a_subclass() -> None:
    class Mine(FusedAccumOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(torch.optim.SGD(params), 2)
            self.max_norm = 3.0

    assert Mine([one()]).max_norm == 3.0


def test_what_the_wrapped_optimizer_has_is_set_there() -> None:
    """Its step() went on with the old value."""

    class Gain(torch.optim.SGD):
        gain: float

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data.sub_(self.gain * p.grad)

    p = one()
    inner = Gain([p])
    inner.gain = 1.0
    opt: Any = FusedAccumOptimizer(inner)
    opt.gain = 10.0
    give(p, 1.0)
    opt.step()
    assert opt.gain == inner.gain == 10.0 and p.tolist() == [-9.0] * 3


def test_another_optimizer_cannot_be_put_into_the_wrapper() -> None:
    """The param groups were the new one's then, and the updates the old one's."""
    p = one()
    opt = sgd(p)
    with pytest.raises(AttributeError, match=r"optimizer is fixed.* it is a SGD, got a Adam"):
        opt.optimizer = torch.optim.Adam([p])


def test_a_name_that_nobody_has() -> None:
    """The message spoke of the wrapped optimizer only, and Python suggested names of that one."""
    opt = sgd(one())
    with pytest.raises(AttributeError, match=r"^neither FusedA.* nor SGD has an attr") as caught:
        opt.window_close  # noqa: B018
    assert caught.value.obj is opt and caught.value.name == "window_close"
    assert not hasattr(opt, "zero_grads")


def test_an_attribute_that_fails_inside_says_why() -> None:
    class Broken(torch.optim.SGD):
        @property
        def gain(self) -> float:
            return self.missing  # type: ignore[attr-defined,no-any-return]

    opt: Any = FusedAccumOptimizer(Broken([one()]))
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'missing'"):
        opt.gain  # noqa: B018
