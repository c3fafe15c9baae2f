"""2,000 updates in bf16 with split masters end where fp32 ends.

What is compared. That the masters of every fused rule follow the same trajectory as fp32
parameters, to the bit, when they are given the same gradients is in test_masters.py. So one rule of
each kind is enough here: a quotient of moments, a quotient without momentum, a sign, momentum,
none. Here the gradients are the model's own: the forward sees parameters rounded to bf16, so no two
trajectories are the same, and the question is whether training ends as well. A student network (156
parameters) learns a teacher from fresh noisy samples at every update; its loss afterwards, noise-
free, on samples of its own, is the result.

The error that fp32 itself has. The result depends on which samples were drawn: eight fp32 runs
that start alike and draw other samples differ by a standard deviation sigma, about 1 % of the loss.
Eight bf16 runs, with yet other samples, must have the same mean as the fp32 runs within three
standard errors of a difference of two such means, 3 sigma sqrt(2 / 8). They share the start, not
the samples: this is what somebody sees who trains again in fp32.

The negative control is bf16 without masters, which must fail the same criterion: its updates are
smaller than half a bf16 step of most parameters and are rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedaccum import FusedAccumOptimizer
from tests.cases import CASES, Case, case_id

UPDATES, RUNS, BATCH, INPUTS, HIDDEN = 2000, 8, 16, 12, 12
NOISE = 0.3
PER_SAMPLE = torch.full((RUNS, BATCH, 1), 1 / BATCH)
# By master_weights; fp32 parameters need none.
DTYPES = {"fp32": torch.float32, "split": torch.bfloat16, "none": torch.bfloat16}
LIMIT = 3.0  # standard errors; a chance of 0.3 % for normal errors, and the samples are fixed


def _case(rule: str, kind: Any, **options: Any) -> Case:
    return Case(rule, kind, tuple(options.items()))


# Learning rates at which fp32 has nearly arrived after 2,000 updates.
SLOW = [
    _case("adam", torch.optim.AdamW, lr=3e-4),
    _case("rmsprop", torch.optim.RMSprop, lr=2e-4),
    _case("sgd", torch.optim.SGD, lr=5e-3),
    _case("sgd_momentum", torch.optim.SGD, lr=5e-4, momentum=0.9),
    *[_case("lion", case.kind, lr=2e-4) for case in CASES if case.rule == "lion"],
]


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    """All runs at once: `weights` and `x` have one row per run."""
    first, second = weights
    return torch.bmm(torch.tanh(torch.bmm(x, first)), second)


def weights(seed: int) -> list[Tensor]:
    """The same for every run."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, INPUTS, HIDDEN, generator=generator) * INPUTS**-0.5
    second = torch.randn(1, HIDDEN, 1, generator=generator) * HIDDEN**-0.5
    return [w.expand(RUNS, -1, -1).contiguous() for w in (first, second)]


@cache
def samples(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of all updates and runs, and what the teacher says to them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(UPDATES, RUNS, BATCH, INPUTS, generator=generator)
    noise = NOISE * torch.randn(UPDATES, RUNS, BATCH, 1, generator=generator)
    teacher = weights(123)
    return x.to(dtype), torch.stack([network(teacher, part) for part in x]) + noise


def excess_loss(student: list[Tensor]) -> Tensor:
    """For each run the mean squared difference from the teacher, noise-free."""
    x = torch.randn(1, 2000, INPUTS, generator=torch.Generator().manual_seed(99))
    x = x.expand(RUNS, -1, -1)
    return (network(student, x) - network(weights(123), x)).square().mean((1, 2))


def train(case: Case) -> dict[str, Tensor]:
    """Losses of fp32, bf16 with split masters and bf16 alone; one backward serves the three."""
    students, opts, data = {}, {}, {}
    for seed, (name, dtype) in enumerate(DTYPES.items()):
        students[name] = [torch.nn.Parameter(w.bfloat16().to(dtype)) for w in weights(7)]
        opts[name] = FusedAccumOptimizer(case.make(students[name]), 1, master_weights=name)
        assert f"fused rule {case.rule!r}" in repr(opts[name])
        data[name] = samples(seed, dtype)
    for i in range(UPDATES):
        losses = []
        for name, student in students.items():
            x, y = data[name]
            losses.append((network(student, x[i]).float() - y[i]).square())
        torch.autograd.backward(losses, [PER_SAMPLE] * len(losses))
        for opt in opts.values():
            opt.step()
            opt.zero_grad()
    result = {}
    for name, student in students.items():
        state = opts[name].state_dict()["state"]
        precise = [state[i].get("master_param", p.detach()) for i, p in enumerate(student)]
        result[name] = excess_loss([w.float() for w in precise])
    return result


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", SLOW, ids=case_id)
def test_bf16_ends_where_fp32_ends(case: Case) -> None:
    untrained = excess_loss(weights(7))
    losses = train(case)
    fp32 = losses["fp32"]
    assert fp32.mean() < 0.3 * untrained.mean()
    standard_error = float(fp32.std()) * (2 / RUNS) ** 0.5
    assert standard_error < 0.05 * fp32.mean()  # or the criterion would let too much pass

    distance = {k: abs(float(v.mean() - fp32.mean())) / standard_error for k, v in losses.items()}
    assert distance["split"] < LIMIT < distance["none"]
