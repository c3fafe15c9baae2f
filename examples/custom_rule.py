"""An optimizer of your own with a fused rule: AdEMAMix (Pagliardini, Ablin and Grangier 2024).

    python examples/custom_rule.py            some seconds on a CPU
    python examples/custom_rule.py --quick    a smoke test

The rule is two Triton functions. On a GPU they become part of one kernel that updates the whole
model; on a CPU a C loop is made from the same text. This script registers the rule, trains a small
bf16 model by it, checks the result against the optimizer's own `step()` on fp32 masters, and exits
with an error if they differ. It imports Triton, because the rule is in the same file. A rule in a
file of its own (docs/add_a_rule.md) also works where Triton is not installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fusedaccum

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise SystemExit(
        f"This example needs Triton ({error}). On Linux: pip install triton. Elsewhere put the two "
        "functions of a rule into a file of their own and give register_rule() its name, which "
        "needs no Triton on a CPU: docs/add_a_rule.md"
    ) from None

# --- The optimizer, as anyone would write it -----------------------------------------------------


class AdEMAMix(torch.optim.Optimizer):
    """Adam with a second, much slower average of the gradient, mixed in with weight `alpha`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, a dozen small operations per tensor."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2, beta3 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p)
                state["step"] += 1
                exp_avg, slow, exp_avg_sq = (
                    state[k] for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")
                )
                exp_avg.lerp_(p.grad, 1 - beta1)
                slow.lerp_(p.grad, 1 - beta3)
                exp_avg_sq.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                correction1 = 1 - beta1 ** state["step"]
                correction2 = 1 - beta2 ** state["step"]
                denom = (exp_avg_sq / correction2).sqrt() + group["eps"]
                update = (exp_avg / correction1 + group["alpha"] * slow) / denom
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
        return loss


# --- Its rule ------------------------------------------------------------------------------------


@triton.jit
def ademamix_scalars(hyper, step, memory):  # type: ignore[no-untyped-def]
    """Once per tensor and update, in float64: all that does not depend on the element."""
    lr, beta1, beta2, beta3, alpha, eps, weight_decay = hyper
    # beta ** step, in the language's own functions.
    inv_correction1 = 1.0 / (1.0 - tl.exp(step * tl.log(beta1)))
    inv_correction2 = 1.0 / (1.0 - tl.exp(step * tl.log(beta2)))
    decay = 1.0 - lr * weight_decay
    weight1, weight2, weight3 = 1.0 - beta1, 1.0 - beta2, 1.0 - beta3
    return (
        (lr, inv_correction1, inv_correction2, weight1, beta2, weight2, weight3, alpha, eps, decay),
        memory,
    )


@triton.jit
def ademamix(param, grad, states, scalars):  # type: ignore[no-untyped-def]
    """For each element, in fp32."""
    exp_avg, exp_avg_slow, exp_avg_sq = states
    lr, inv_correction1, inv_correction2, weight1, beta2, weight2, weight3, alpha, eps, decay = (
        scalars
    )
    exp_avg = exp_avg + weight1 * (grad - exp_avg)
    exp_avg_slow = exp_avg_slow + weight3 * (grad - exp_avg_slow)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    denom = tl.sqrt(exp_avg_sq * inv_correction2) + eps
    update = (exp_avg * inv_correction1 + alpha * exp_avg_slow) / denom
    param = param * decay - lr * update
    return param, (exp_avg, exp_avg_slow, exp_avg_sq)


def register() -> None:
    """Tell fusedaccum which class the rule belongs to, and where its numbers are."""
    fusedaccum.register_rule(
        AdEMAMix,
        "ademamix",
        kernels=__name__,
        hyper=lambda g: (g["lr"], *g["betas"], g["alpha"], g["eps"], g["weight_decay"]),
        n_hyper=7,
        states=("exp_avg", "exp_avg_slow", "exp_avg_sq"),
    )


# --- The proof -----------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_updates: int) -> None:
    """Four micro-batches per update, the same for everybody."""
    generator = torch.Generator().manual_seed(1)
    weight = next(model.parameters())
    for _ in range(n_updates):
        for _ in range(4):
            x = torch.randn(8, 64, generator=generator).to(weight)
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def masters(opt: fusedaccum.FusedAccumOptimizer) -> list[Tensor]:
    """The fp32 values of the parameters."""
    saved = opt.state_dict()["state"]
    return [saved[i]["master_param"] for i in sorted(saved)]


def main(argv: Sequence[str] | None = None) -> int:
    """Train by the optimizer's own step and by the rule; compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    updates = 4 if args.quick else args.updates
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(
        device, torch.bfloat16
    )
    trained: list[list[Tensor]] = []
    for is_registered in (False, True):
        if is_registered:
            register()
        own = copy.deepcopy(model)
        opt = fusedaccum.FusedAccumOptimizer(
            AdEMAMix(own.parameters(), lr=1e-3), gradient_accumulation_steps=4, max_grad_norm=1.0
        )
        print(opt)
        train(own, opt, updates)
        trained.append(masters(opt))
    native, fused = trained
    worst = max(float((a - b).abs().max()) for a, b in zip(native, fused, strict=True))
    moves = "one update moves up to about 5e-3"
    print(f"largest difference after {updates} updates: {worst:.1e} ({moves})")
    return 0 if worst < 5e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
