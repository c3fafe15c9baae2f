"""What is kept from one micro-batch and update to the next holds exactly as long as it is right.

Two wrappers do the same; one of them keeps nothing. Every bit of theirs is the same after each
operation, whatever was changed in between.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedaccum import FusedAccumOptimizer
from fusedaccum.backends.tables import LaunchTable
from fusedaccum.update.fused import _Prepared
from fusedaccum.window.adding import Adder, _Queue
from fusedaccum.window.slots import Slot

N = 2
SIZES = [(5, 3), (7,), (1,), (2, 2), (40, 30)]


class Side:
    """A wrapper, its parameters, and what may be done to them."""

    def __init__(self, dtype: torch.dtype, backend: str, kind: type, options: dict[str, Any]):
        generator = torch.Generator().manual_seed(3)
        self.params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SIZES]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:4], "lr": 0.02}]
        self.opt = FusedAccumOptimizer(
            kind(groups, lr=0.01, **options), N, max_grad_norm=1.0, backend=backend
        )
        self.saved = copy.deepcopy(self.opt.state_dict())

    def micro_batch(self, draw: random.Random) -> None:
        order = list(self.params)
        if draw.random() < 0.3:
            draw.shuffle(order)
        if draw.random() < 0.2:
            order.pop()
        factors = [draw.uniform(-1, 1) for _ in order]
        if draw.random() < 0.05:
            factors[0] = float("nan")
        terms = [(p.float() * f).sum() for p, f in zip(order, factors, strict=True)]
        needed = [t for t in terms if t.requires_grad]
        if needed:
            torch.stack(needed).sum().backward()
        self.opt.step()
        self.opt.zero_grad()

    # --- what a training loop, a framework or a person may do in between ---

    def nothing(self, draw: random.Random) -> None:
        pass

    def schedule(self, draw: random.Random) -> None:
        if self.opt.window_closed:
            self.opt.param_groups[0]["lr"] = draw.uniform(0.001, 0.05)

    def freeze(self, draw: random.Random) -> None:
        param = draw.choice(self.params)
        param.requires_grad_(not param.requires_grad)

    def regroup(self, draw: random.Random) -> None:
        if not self.opt.micro_batches:
            first, second = (g["params"] for g in self.opt.param_groups[:2])
            if len(first) > 1:
                second.append(first.pop())
            else:
                first.append(second.pop(0))

    def add_group(self, draw: random.Random) -> None:
        if len(self.opt.param_groups) == 2:
            self.opt.add_param_group({"params": self.params[4:]})

    def move(self, draw: random.Random) -> None:
        param = draw.choice(self.params)
        param.data = param.data.clone()

    def write(self, draw: random.Random) -> None:
        with torch.no_grad():
            draw.choice(self.params).mul_(draw.uniform(0.5, 1.5))

    def replace_state(self, draw: random.Random) -> None:
        state = self.opt.state.get(draw.choice(self.params), {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.clone() * 0.5

    def move_state(self, draw: random.Random) -> None:
        state = self.opt.state.get(draw.choice(self.params), {})
        for value in state.values():
            if isinstance(value, Tensor) and value.dim():
                value.data = value.data.clone() * 0.5

    def share_memory(self, draw: random.Random) -> None:
        """A tensor that is sent to another process moves, with all of its buffer."""
        param = draw.choice(self.params)
        shown = [param.grad, *self.opt.state.get(param, {}).values()]
        for value in shown[:1] if draw.random() < 0.5 else shown:
            if isinstance(value, Tensor):
                value.share_memory_()

    def forget_state(self, draw: random.Random) -> None:
        self.opt.state.pop(draw.choice(self.params), None)

    def load(self, draw: random.Random) -> None:
        if len(self.opt.param_groups) == len(self.saved["param_groups"]):
            self.opt.load_state_dict(copy.deepcopy(self.saved))

    def save(self, draw: random.Random) -> None:
        self.saved = copy.deepcopy(self.opt.state_dict())

    def switch_rule(self, draw: random.Random) -> None:
        group = self.opt.param_groups[0]
        if "amsgrad" in group and not self.opt.micro_batches:
            group["amsgrad"] = not group["amsgrad"]

    def take_gradient(self, draw: random.Random) -> None:
        draw.choice(self.params).grad = None

    def double_gradient(self, draw: random.Random) -> None:
        param = draw.choice(self.params)
        if self.opt.micro_batches and param.grad is not None:
            param.grad.mul_(2.0)

    def unclip(self, draw: random.Random) -> None:
        self.opt.max_grad_norm = draw.choice([None, 0.5, 1.0])

    def see(self) -> list[Tensor]:
        """All that there is, in a fixed order."""
        found = [p.detach() for p in self.params]
        found += [p.grad for p in self.params if p.grad is not None]
        for param in self.params:
            state = self.opt.state.get(param, {})
            found += [state[name].detach() for name in sorted(state)]
        slots = self.opt._core.collector.slots
        masters = self.opt._core.updater.masters
        found += [
            m for p in self.params if p in slots and (m := masters[slots[p]].tensor) is not None
        ]
        return [torch.as_tensor(t).clone() for t in found]


CHANGES: list[Callable[[Side, random.Random], None]] = [
    Side.nothing, Side.nothing, Side.nothing, Side.schedule, Side.freeze, Side.regroup,
    Side.add_group, Side.move, Side.write, Side.replace_state, Side.move_state, Side.forget_state,
    Side.share_memory, Side.load, Side.save, Side.switch_rule, Side.take_gradient,
    Side.double_gradient, Side.unclip,
]  # fmt: skip


def differences(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Side], seed: int, n_operations: int = 60
) -> list[str]:
    """The operations after which two sides differ, of which the second keeps nothing; the first
    one ends it."""
    ours, plain = make(), make()
    again, holds = Adder.add_again, _Prepared.holds
    for i in range(n_operations):
        change = random.Random(f"{seed} {i}").choice(CHANGES)
        seen = []
        for side in (ours, plain):
            keeps = side is ours
            monkeypatch.setattr(Adder, "add_again", again if keeps else lambda *a: False)
            monkeypatch.setattr(_Prepared, "holds", holds if keeps else lambda *a: False)
            draw = random.Random(f"{seed} {i} numbers")
            try:
                change(side, draw)
                side.micro_batch(draw)
            except (RuntimeError, ValueError) as error:
                seen.append([str(error)])
                side.opt.zero_grad()
            else:
                seen.append([f"{t.dtype} {t.tolist()}" for t in side.see()])
        if seen[0] != seen[1]:
            return [change.__name__]
    return []


ADAMW: tuple[type, dict[str, Any]] = (torch.optim.AdamW, {"weight_decay": 0.1})
SGD: tuple[type, dict[str, Any]] = (torch.optim.SGD, {"momentum": 0.9})
PLAIN: tuple[type, dict[str, Any]] = (torch.optim.SGD, {})
RPROP: tuple[type, dict[str, Any]] = (torch.optim.Rprop, {})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    [
        pytest.param("torch", torch.bfloat16, ADAMW, id="torch-adamw-bf16"),
        pytest.param("torch", torch.float32, SGD, id="torch-sgd-fp32"),
        pytest.param("torch", torch.float32, PLAIN, id="torch-plain-sgd-fp32"),
        pytest.param("torch", torch.float16, RPROP, id="torch-rprop-fp16"),
        pytest.param("triton", torch.bfloat16, ADAMW, id="triton-adamw-bf16"),
    ],
)
def test_what_is_kept_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    kind: tuple[type, dict[str, Any]],
    seed: int,
) -> None:
    n_operations = 60 if backend == "torch" else 24
    assert not differences(monkeypatch, lambda: Side(dtype, backend, *kind), seed, n_operations)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("blind", ["update", "queue"])
def test_the_walk_sees_what_is_kept_too_long(monkeypatch: pytest.MonkeyPatch, blind: str) -> None:
    """The negative control."""
    if blind == "update":
        monkeypatch.setattr(_Prepared, "holds", lambda *args: True)
    else:
        monkeypatch.setattr(
            _Queue, "grads", lambda queue: [torch.ones_like(acc) for acc in queue.accs]
        )
    make = lambda: Side(torch.bfloat16, "torch", *ADAMW)  # noqa: E731
    assert any(differences(monkeypatch, make, seed) for seed in range(6))


def test_nothing_is_asked_of_each_parameter_in_the_middle_of_a_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the queue is known; neither are launch tables made, nor numbers uploaded, but where an
    address changed."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(40)]
    opt = FusedAccumOptimizer(torch.optim.SGD(params), 100)

    def micro_batch() -> None:
        torch.stack([p.sum() for p in params]).sum().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(3):
        micro_batch()
    asked: list[str] = []
    for owner, name in ((Slot, "difference"), (Slot, "part"), (LaunchTable, "__init__")):
        method = getattr(owner, name)

        def counted(*args: Any, name: str = name, method: Any = method) -> Any:
            asked.append(name)
            return method(*args)

        monkeypatch.setattr(owner, name, counted)
    for _ in range(3):
        micro_batch()
    assert asked == []
    params[7].data = params[7].data.clone()  # now there is something to ask
    micro_batch()
    assert set(asked) == {"difference"}


def test_accumulators_that_move_to_shared_memory() -> None:
    """torch.multiprocessing moves what is sent. Launches went on to write where it had been."""
    params = [nn.Parameter(torch.ones(1000)) for _ in range(3)]
    opt = FusedAccumOptimizer(torch.optim.SGD(params), 100)
    for i in range(6):
        if i == 4:
            assert params[1].grad is not None
            params[1].grad.share_memory_()
        torch.stack([p.sum() for p in params]).sum().backward()
        opt.step()
    for param in params:
        torch.testing.assert_close(param.grad, torch.full((1000,), 0.06))


def test_a_detached_wrapper_keeps_no_accumulator() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = FusedAccumOptimizer(torch.optim.SGD([param]), 1)
    for _ in range(3):
        param.sum().backward()
        opt.step()
        opt.zero_grad()
    attached = opt._core.collector.attached
    assert attached.queues
    opt.detach()
    assert not attached.queues
