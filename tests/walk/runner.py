"""Runs a walk: each line on the optimizer, each call on the oracle, and a comparison after both."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import equal_bits
from tests.walk import helpers, more_actions  # noqa: F401  (registers them)
from tests.walk.actions import Action, draw_action
from tests.walk.numbers import NORM_RTOL, U
from tests.walk.slots import DISCARDED, EMPTY, MANY, RATE, Expected, Unspecified
from tests.walk.update import Param
from tests.walk.world import Config, World, draw_config

CLEAN = {name: value for name, value in vars(helpers).items() if not name.startswith("__")}


_HEADS = {
    "compiled": "",
    "aten": 'import os\n\nos.environ["FUSEDACCUM_CC"] = "0"\n',
    "triton": 'import os\n\nos.environ["TRITON_INTERPRET"] = "1"\n',
}


@dataclass
class Failure:
    """What went wrong.

    Attributes:
        kind: the same for failures that are probably the same.
        detail: what was expected, and what came.
        lines: all lines up to it.
    """

    kind: str
    detail: str
    lines: list[str]

    def script(self, path: str = "compiled") -> str:
        """A file that does the same again, run at the repository's root."""
        body = "\n".join(self.lines)
        comment = "\n".join(f"# {line}" for line in self.detail.splitlines())
        return f"{_HEADS[path]}from tests.walk.helpers import *\n\n{body}\n{comment}\n"


class Mismatch(Exception):
    """Expected and got differ."""


def _warning_kind(message: str) -> str:
    for words, kind in (
        ("discards", DISCARDED), ("no gradient arrived", EMPTY),
        ("count as one micro-batch", MANY), ("rate changed inside", RATE),
    ):  # fmt: skip
        if words in message:
            return kind
    return message


def _is_numpys(warning: warnings.WarningMessage) -> bool:
    """Whether Triton's interpreter, which runs on numpy, met NaN or infinity."""
    return "triton" in warning.filename or "encountered in" in str(warning.message)


def execute(code: str, names: dict[str, Any], expected: Expected, warned: set[str]) -> None:
    """Run lines; compare error and warnings. `warned`: what came before, and is said once."""
    error: Exception | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(code, names)
        except Exception as raised:
            error = raised
    if expected.error is None and error is not None:
        words = re.sub(r"[0-9(\[].*", "", str(error))[:60]
        raise Mismatch(f"error {type(error).__name__}: {words}", f"{type(error).__name__}: {error}")
    if expected.error is not None and not isinstance(error, expected.error):
        raise Mismatch(f"no {expected.error.__name__}", f"expected an error, got {error!r}")
    got = [_warning_kind(str(w.message)) for w in caught if not _is_numpys(w)]
    missing = [w for w in expected.warnings if w not in got]
    perhaps = {EMPTY, MANY, RATE} - warned
    extra = [w for w in got if w not in expected.warnings and w not in perhaps]
    if missing or extra or len(got) != len(set(got)):
        raise Mismatch(
            f"warnings: missing {missing}, not expected {[e[:50] for e in extra]}",
            f"expected {expected.warnings}, got {[str(w.message) for w in caught]}",
        )
    warned.update({EMPTY, MANY, RATE}.intersection(got))


def _worst(got: Tensor, exact: Tensor, bound: Tensor) -> str | None:
    """Where the difference exceeds the bound. Infinity and NaN are one: some skip 0 * inf."""
    if got.shape != exact.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    got = got.detach().double()
    same = (got == exact) | ~(got.isfinite() | exact.isfinite())
    bad = ~(same | ((got - exact).abs() <= bound))
    if not bool(bad.any()):
        return None
    where = int(bad.flatten().nonzero()[0])
    g, e, b = (float(t.flatten()[where]) for t in (got, exact, bound.expand_as(got)))
    return f"got {g!r}, expected {e!r} +- {b:.1e} at element {where}; {int(bad.sum())} differ"


def compare(world: World, names: dict[str, Any], action: str) -> None:
    """All that the public API shows."""
    oracle, update, opt = world.oracle, world.oracle.update, names["opt"]
    for i, (param, p) in enumerate(zip(update.params, names["p"], strict=True)):
        _compare_param(world, i, param, p.detach())
    if action in ("clip_grad_norm_", "torch_clip") and not oracle.expected.error:
        assert update.returned is not None
        norm, error = update.returned
        if wrong := _worst(names["norm"], norm, error):
            raise Mismatch("the returned norm", wrong)
    for i, (slot, p) in enumerate(zip(oracle.slots, names["p"], strict=True)):
        if not slot.is_known or oracle.destroyed:
            continue
        if (slot.grad is None) != (p.grad is None):
            shows = "None" if p.grad is None else "a gradient"
            raise Mismatch("p.grad None", f"p[{i}].grad shows {shows}, expected {slot.grad}")
        if slot.grad is None or p.grad is None:
            continue
        bound = slot.grad.error + 2.0**-140
        if p.grad.dtype != torch.float32:
            if slot.arrived:
                raise Mismatch("p.grad dtype", f"p[{i}].grad is {p.grad.dtype}")
            bound = bound + slot.grad.value.abs() * 2.0**-6
        if wrong := _worst(p.grad, slot.grad.value, bound):
            raise Mismatch("p.grad", f"p[{i}].grad: {wrong}")
    holds = oracle.counts or any(slot.acc is not None for slot in oracle.slots)
    is_sure = not (oracle.removed or oracle.by_model) and holds
    if is_sure and opt.micro_batches != oracle.micro_batches:
        raise Mismatch("micro_batches", f"got {opt.micro_batches}, expected {oracle.micro_batches}")
    if oracle.window_closed is not None and opt.window_closed is not oracle.window_closed:
        raise Mismatch("window_closed", f"expected {oracle.window_closed}")
    if update.norm_is_known:
        if (update.norm is None) != (opt.grad_norm is None):
            raise Mismatch("grad_norm None", f"got {opt.grad_norm}, expected {update.norm}")
        if update.norm is not None and (wrong := _worst(opt.grad_norm, *update.norm)):
            raise Mismatch("grad_norm", wrong)
    if world.config.watches_skipped and int(opt.skipped_steps) != update.skipped:
        raise Mismatch("skipped_steps", f"got {int(opt.skipped_steps)}, not {update.skipped}")
    if action == "load_into_plain":
        _compare_plain(world, names["q"])
    if action == "save" and not oracle.expected.error:
        _compare_saved(world, names["saved"])
    if action == "rewrap" and not oracle.expected.error:
        _take_states(world, opt, names["p"])


def _compare_param(world: World, i: int, param: Param, p: Tensor) -> None:
    shown = world.shown[i]
    if not param.moved:
        if not equal_bits(p, shown) and not (p.isnan() & shown.isnan()).any():
            wrong = _worst(p, shown.double(), torch.zeros_like(param.error))
            raise Mismatch("a parameter changed", f"p[{i}]: {wrong}")
        return
    param.moved = False
    if wrong := _worst(p, param.value, param.rounding() + param.error):
        raise Mismatch("parameter", f"p[{i}]: {wrong}")
    world.shown[i] = p.clone()
    if not param.has_master:
        world.oracle.update.believe(i, p)


def _compare_plain(world: World, q: list[Tensor]) -> None:
    """What the plain optimizer made of the parameters in fp32."""
    assert world.plain is not None
    for i, (param, got) in enumerate(zip(world.plain.params, q, strict=True)):
        exact, bound = param.value, param.error
        if param.dtype == torch.float32 and (wrong := _worst(got, exact, bound)):
            raise Mismatch("the plain optimizer", f"q[{i}]: {wrong}")


def _compare_saved(world: World, saved: dict[str, Any]) -> None:
    """Masters and states of a state dict."""
    update = world.oracle.update
    order = [i for part in update.layout for i in part]
    for key, i in enumerate(order):
        param, entry = update.params[i], saved["state"].get(key, {})
        master = entry.get("master_param")
        if master is not None and param.has_master:
            if wrong := _worst(master, param.value, param.error):
                raise Mismatch("master_param", f"of p[{i}]: {wrong}")
            for each in (world.oracle, world.saved):
                if each is not None:
                    each.update.believe(i, master)
        for name, exact in update.plain.state.get(param.exact, {}).items():
            _compare_state(i, param, name, entry.get(name), exact)


def _compare_state(i: int, param: Param, name: str, got: Any, exact: Any) -> None:
    if not isinstance(exact, Tensor) or not exact.numel():
        return
    if got is None:
        raise Mismatch("state missing", f"{name} of p[{i}]")
    if name in ("step", "mu_product", "eta", "mu") or not isinstance(got, Tensor):
        if abs(float(got) - float(exact)) > 1e-6 * abs(float(exact)):
            raise Mismatch(f"state {name}", f"of p[{i}]: got {got}, expected {exact}")
        return
    exact = exact.double()
    scale = (
        exact.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=4.0)
    )  # gradients are smaller than 4, and may cancel
    eps = torch.finfo(param.dtype).eps * 4 if param.kind == "native" else 256 * U + 4 * NORM_RTOL
    if wrong := _worst(got, exact, scale * eps + 2 * param.blur):
        raise Mismatch(f"state {name}", f"of p[{i}]: {wrong}")


def _take_states(world: World, opt: Any, p: list[Tensor]) -> None:
    """detach() rounds states to a parameter's dtype; go on from the rounded ones."""
    update = world.oracle.update
    for param, real in zip(update.params, p, strict=True):
        if param.dtype == torch.float32:
            continue
        for name, exact in update.plain.state.get(param.exact, {}).items():
            if isinstance(exact, Tensor) and exact.dim() and exact.numel():
                got = opt.state[real][name]
                largest = exact.double().nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=4.0)
                bound = largest * torch.finfo(param.dtype).eps
                if wrong := _worst(
                    got, exact.double(), bound + 2 * param.drift.max() + 2 * param.blur
                ):
                    raise Mismatch(f"state {name} after detach", wrong)
                exact.copy_(got)


def run(config: Config, actions: list[Action]) -> Failure | None:
    """One walk; None where all is as promised."""
    world = World(config)
    names = dict(CLEAN)
    lines, is_left_out, may_raise = [world.start()], [False], [False]
    action = Action("start")
    try:
        execute(lines[0], names, Expected(), set())
        for action in actions:
            world.oracle.expected = Expected()
            try:
                code = action.apply(world)
            except Unspecified:
                continue
            lines.append(code)
            is_left_out.append(action.name == "copied")
            # After what no checkpoint holds, a line may raise without one.
            is_sure = world.oracle.expected.error is None and world.oracle.is_whole
            may_raise.append(not is_sure)
            execute(code, names, world.oracle.expected, world.oracle.warned)
            try:
                compare(world, names, action.name)
            except (RuntimeError, StopIteration) as error:
                raise Mismatch(f"looking at it: {type(error).__name__}", repr(error)) from error
            if not all(bool(p.exact.isfinite().all()) for p in world.oracle.update.params):
                break  # whether 0 * inf is left out is not promised
        if any(is_left_out) and world.oracle.is_whole:
            action = Action("the end")
            rest = zip(lines, is_left_out, may_raise, strict=True)
            _compare_uninterrupted(
                world, names, [(line, raises) for line, out, raises in rest if not out]
            )
    except Mismatch as wrong:
        kind, detail = wrong.args
        return Failure(f"{action.name}: {kind}", detail, lines)
    return None


def _with_one_nan(values: Tensor) -> Tensor:
    """Every NaN in the same bits: which ones arithmetic leaves depends on the order of operands."""
    return torch.where(values.isnan(), torch.full_like(values, torch.nan), values)


def _compare_uninterrupted(
    world: World, names: dict[str, Any], lines: list[tuple[str, bool]]
) -> None:
    """The same lines without the copies give the same bits; of each, whether it may raise."""
    other = dict(CLEAN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line, may_raise in lines:
            try:
                exec(line, other)
            except Exception as error:
                if not may_raise:
                    raise Mismatch(
                        "an error in an uninterrupted run", f"{line}: {error}"
                    ) from error
    for i, (p, q) in enumerate(zip(names["p"], other["p"], strict=True)):
        if not equal_bits(*map(_with_one_nan, (p.detach(), q.detach()))):
            wrong = _worst(
                p.detach(), q.detach().double(), torch.zeros_like(p, dtype=torch.float64)
            )
            raise Mismatch("not the bits of an uninterrupted run", f"p[{i}]: {wrong}")


def draw(seed: str, backend: str | None = None) -> tuple[Config, list[Action]]:
    """The walk of a seed."""
    rng = random.Random(seed)
    config = draw_config(rng, backend)
    return config, [draw_action(rng) for _ in range(rng.choice([10, 20, 30, 40]))]
