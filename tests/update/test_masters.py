"""Master weights: a split one is an fp32 one, and the parameter people see is its rounded value."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer, functional
from fusedaccum.backends import Keep, reference
from fusedaccum.rules.builtin import RULES
from tests.cases import CASES, Case, Gradients, case_id, small_model
from tests.tolerances import equal_bits

# One case of each fused rule, the one with the most options.
BY_RULE = {case.rule: case for case in sorted(CASES, key=lambda case: len(case.options))}


def masters(opt: FusedAccumOptimizer) -> list[Tensor]:
    params = [p for g in opt.param_groups for p in g["params"]]
    state = opt.state_dict()["state"]
    return [state[i].get("master_param", p.detach()) for i, p in enumerate(params)]


@pytest.mark.parametrize("case", BY_RULE.values(), ids=lambda case: case.rule)
def test_masters_equal_true_fp32_parameters_to_the_bit(case: Case) -> None:
    """Given the same gradients, after a hundred updates of each rule and a thousand of Adam."""
    start = [torch.randn(300).bfloat16(), torch.randn(7, 5).bfloat16()]
    models = {
        "split": Gradients(start),
        "fp32": Gradients(start),
        "true": Gradients([s.float() for s in start]),
    }
    opts = {
        name: FusedAccumOptimizer(
            case.make(model.parameters(), lr=1e-3),
            1,
            master_weights="none" if name == "true" else name,
        )
        for name, model in models.items()
    }
    for _ in range(1000 if case.rule == "adam" else 100):
        grads = [torch.randn(s.shape).bfloat16() for s in start]
        for name, model in models.items():
            model.backward(grads)
            opts[name].step()
            opts[name].zero_grad()
    expected = [p.detach() for p in models["true"].params]
    for name in ("split", "fp32"):
        for mine, true in zip(masters(opts[name]), expected, strict=True):
            assert equal_bits(mine, true)
        for visible, true in zip(models[name].params, expected, strict=True):
            half_ulp = torch.finfo(torch.bfloat16).eps / 2 * true.abs()
            assert ((visible.float() - true).abs() <= half_ulp).all()


def test_every_rule_is_among_them() -> None:
    assert set(BY_RULE) == set(RULES) - ({"lion"} if find_spec("lion_pytorch") is None else set())


def test_without_masters_small_updates_are_lost() -> None:
    """The negative control: 1000 updates of a thousandth of an ulp move nothing in bf16."""
    moved = {}
    for mode in ("split", "none"):
        model = Gradients([torch.ones(8, dtype=torch.bfloat16)])
        opt = FusedAccumOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-4), 1, master_weights=mode
        )
        for _ in range(1000):
            model.backward([torch.ones(8)])
            opt.step()
        moved[mode] = 1 - model.params[0].detach().float()
    assert torch.equal(moved["none"], torch.zeros(8))
    torch.testing.assert_close(moved["split"], torch.full((8,), 0.1), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("dtype", "mode", "kind"),
    [
        (torch.bfloat16, None, "split"), (torch.bfloat16, "fp32", "fp32"),
        (torch.bfloat16, "none", "none"), (torch.float16, None, "fp32"),
        (torch.float32, None, "none"), (torch.float32, "split", "none"),
        (torch.float32, "fp32", "none"),
    ],
    ids=case_id,
)  # fmt: skip
def test_modes(dtype: torch.dtype, mode: str | None, kind: str) -> None:
    model = Gradients([torch.ones(3, dtype=dtype)])
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 1, master_weights=mode)
    model.backward([torch.ones(3)])
    opt.step()
    state = opt.state_dict()["state"][0]
    assert ("master_param" in state) is (kind != "none")
    assert (f"with {kind} master" in repr(opt)) is (kind != "none")
    updater = opt._core.updater
    assert updater.masters[updater.collector.slots[model.params[0]]].keep is Keep(kind)


def test_mixed_dtypes_in_one_group() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = Gradients([torch.ones(4, dtype=d) for d in dtypes])
    exact = Gradients([torch.ones(4) for _ in dtypes])
    opts = [
        FusedAccumOptimizer(torch.optim.AdamW(m.parameters(), lr=0.1), 2) for m in (mixed, exact)
    ]
    for value in (1.0, 3.0, 5.0, 7.0):
        for model, opt in zip((mixed, exact), opts, strict=True):
            model.backward([torch.full((4,), value)] * 3)
            opt.step()
            opt.zero_grad()
    for mine, true in zip(masters(opts[0]), exact.params, strict=True):
        assert equal_bits(mine, true.detach())


@pytest.mark.parametrize("mode", ["split", "fp32"])
def test_loading_weights_in_mid_run(mode: str) -> None:
    """The loaded weights show. A split master keeps its remainder, which is within half a step."""
    model, other = small_model(torch.bfloat16), small_model(torch.bfloat16, seed=5)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    opt = FusedAccumOptimizer(inner, 1, master_weights=mode)
    model(torch.randn(3, 7).bfloat16()).sum().backward()
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(other.state_dict())
    for mine, theirs, old in zip(masters(opt), other.parameters(), before, strict=True):
        shown = mine.bfloat16() if mode == "fp32" else reference.split_master(mine)[0]
        assert equal_bits(shown, theirs.detach())
        if mode == "fp32":
            changed = theirs != old
            assert changed.any() or theirs.dim() == 1  # norms and biases may start alike
            assert torch.equal(mine[changed], theirs[changed].float())


def test_functional_split_is_the_same_as_fp32() -> None:
    torch.manual_seed(0)
    start = torch.randn(9000).bfloat16()
    results = []
    for master in (torch.zeros(9000, dtype=torch.int16), start.float()):
        params, avgs, sqs = [start.clone()], [torch.zeros(9000)], [torch.zeros(9000)]
        steps = torch.zeros(1)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            grads = [torch.randn(9000, generator=generator)]
            functional.adamw_(params, grads, avgs, sqs, steps, lr=1e-3, masters=[master])
        results.append((params[0], master))
    (high, low), (_, true) = results
    joined = (high.float().view(torch.int32) + low.int()).view(torch.float32)
    assert equal_bits(joined, true)
