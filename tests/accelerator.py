"""What runs on a device that is neither a CPU nor a CUDA GPU, and has no float64.

    python -m tests.accelerator

The device is that of `accelerator.cpp`, which stands in for Apple's GPUs. Each case trains on it
and on the CPU, and both have to come to the same. The device stays in its process: the tests run
this as a subprocess.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import rename_privateuse1_backend

from fusedaccum import FusedAccumOptimizer, functional
from fusedaccum.__main__ import main as command

NAME = "stub"
COMPILER = shutil.which("g++") or shutil.which("c++")
STEPS = 6


def install() -> None:
    """Make the device, and tell torch of it."""
    source, root = Path(__file__).with_name("accelerator.cpp"), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "accelerator.so"
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        linked = [str(source), "-o", str(library), "-ltorch_cpu", "-lc10"]
        subprocess.run([str(COMPILER), *flags, *linked], check=True)
        rename_privateuse1_backend(NAME)
        module = ModuleType(f"torch.{NAME}")
        answers: dict[str, Any] = {
            "is_available": True, "device_count": 1, "current_device": 0,
            "_is_in_bad_fork": False, "manual_seed_all": None,
        }  # fmt: skip
        for name, answer in answers.items():
            setattr(module, name, lambda *_, answer=answer: answer)
        torch._register_device_module(NAME, module)
        torch.ops.load_library(library)


def data(i: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(i)
    return torch.randn(4, 16, generator=generator).to(dtype).to(device)


def net(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 3)).to(dtype).to(device)


def train(
    model: nn.Module, opt: FusedAccumOptimizer, steps: range, scaler: Any = None
) -> list[Tensor]:
    """Micro-batches and what comes of them: of weights 1, 2, ... or with a scaler, which the third
    one's loss overflows."""
    first = next(model.parameters())
    for i in steps:
        loss = model(data(i, first.device.type, first.dtype)).square().mean()
        if scaler is not None:
            scaler.scale(loss * torch.inf if i == 2 else loss).backward()
            if opt.gradient_accumulation_steps or i % 2:
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            continue
        with opt.micro_batch(weight=1 + i):
            loss.backward()
        opt.step()
        opt.zero_grad()
    return [*model.parameters(), *([] if opt.grad_norm is None else [opt.grad_norm])]


def whole_windows(device: str) -> list[Tensor]:
    model = net(device)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2, max_grad_norm=0.5)
    return train(model, opt, range(STEPS))


def without_rule(device: str) -> list[Tensor]:
    """The wrapped optimizer's own step, clipped."""
    model = net(device)
    opt = FusedAccumOptimizer(torch.optim.Adafactor(model.parameters()), 2, max_grad_norm=0.1)
    return train(model, opt, range(STEPS))


def by_hand(device: str) -> list[Tensor]:
    """Gradients that are assigned, and clipped."""
    model = net(device)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 1)
    for i in range(STEPS):
        model(data(i, device, torch.float32)).square().mean().backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad = param.grad * 0.5
        assert opt.clip_grad_norm_(0.1).device.type == device
        opt.step()
        opt.zero_grad()
    return list(model.parameters())


def linked_scaler(device: str) -> list[Tensor]:
    model, scaler = net(device), torch.amp.GradScaler(device)
    adam = torch.optim.AdamW(model.parameters())
    found = train(model, FusedAccumOptimizer(adam, 2, grad_scaler=scaler), range(STEPS), scaler)
    return [*found, torch.tensor(scaler.get_scale())]


def scale_handed_over(device: str) -> list[Tensor]:
    model, scaler = net(device), torch.amp.GradScaler(device)
    opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), None, fused_unscale=True)
    return train(model, opt, range(STEPS), scaler)


def resumed(device: str) -> list[Tensor]:
    """In mid-window, from a checkpoint on the host."""
    found: list[Any] = []
    for steps in (range(3), range(3, STEPS)):
        model = net(device, torch.bfloat16)
        opt = FusedAccumOptimizer(torch.optim.AdamW(model.parameters()), 2)
        if found:
            model.load_state_dict(found[0])
            opt.load_state_dict(found[1])
        result = train(model, opt, steps)
        found = tree_map_only(Tensor, Tensor.cpu, [dict(model.state_dict()), opt.state_dict()])
    return result


def fused_linears(device: str) -> list[Tensor]:
    model = net(device)
    opt = FusedAccumOptimizer(torch.optim.SGD(model.parameters(), 0.1), 2)
    opt.fuse_linear_wgrad(model, min_numel=1)
    return train(model, opt, range(STEPS))


def functions(device: str) -> list[Tensor]:
    grads = [data(i, device, torch.bfloat16) for i in range(3)]
    accs = [torch.zeros(4, 16, dtype=torch.float32, device=device) for _ in grads]
    functional.accumulate_(accs, grads, scale=0.5)
    return [*accs, functional.global_norm(accs)]


def ties(device: str) -> list[Tensor]:
    """Two parameters of one memory are refused, though nothing has an address."""
    model = net(device)
    other = nn.Parameter(model[0].weight.detach())  # type: ignore[index]
    try:
        FusedAccumOptimizer(torch.optim.SGD([*model.parameters(), other], 0.1), 2)
    except ValueError as error:
        assert "share memory" in str(error)
        return []
    raise AssertionError("they were taken")


CASES: tuple[Callable[[str], list[Tensor]], ...] = (
    whole_windows, without_rule, by_hand, linked_scaler, scale_handed_over, resumed, fused_linears,
    functions, ties,
)  # fmt: skip


def main() -> int:
    install()
    for case in CASES:
        expected, found = case("cpu"), case(NAME)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.cpu(), one.cpu(), rtol=1e-5, atol=1e-6)
        print(case.__name__, flush=True)
    return command(["doctor", "--device", NAME])


if __name__ == "__main__":
    sys.exit(main())
