"""A walk's start: the optimizer, the parameters and the options, and what the lines have made."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.walk import helpers
from tests.walk.numbers import OPTIMIZERS, Kind
from tests.walk.oracle import Oracle
from tests.walk.slots import Unspecified
from tests.walk.update import Param, Update, master_kind

STEPS = [None, 1, 2, 3, 5]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_NAMES = {F32: "F32", BF16: "BF16", F16: "F16"}
_SHAPES = {
    "contiguous": [(3,), (), (0,), (1,), (2, 3), (17,), (0, 2), (8193,), (3, 5461)],
    "transposed": [(2, 3), (5, 3), (129, 130)],
    "channels_last": [(2, 3, 2, 2)],
}
_BIG = 2000  # elements; drawn less often, since they are slow


@dataclass(frozen=True)
class ParamSpec:
    """How one parameter is made."""

    shape: tuple[int, ...] = (3,)
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    frozen: bool = False
    seed: int = 0

    @property
    def code(self) -> str:
        more = "" if self.layout == "contiguous" else f', layout="{self.layout}"'
        more += ", frozen=True" if self.frozen else ""
        return f"parameter({self.shape}, {_NAMES[self.dtype]}, {self.seed}{more})"

    def make(self) -> torch.nn.Parameter:
        return helpers.parameter(self.shape, self.dtype, self.seed, self.layout, self.frozen)


def draw_param(rng: random.Random) -> ParamSpec:
    layout = rng.choice(["contiguous"] * 4 + ["transposed", "channels_last"])
    shape = rng.choice(_SHAPES[layout])
    if torch.Size(shape).numel() > _BIG and rng.random() < 0.7:
        shape = (2, 3)
        layout = "contiguous"
    dtype = rng.choice([F32, F32, BF16, BF16, F16])
    return ParamSpec(shape, dtype, layout, rng.random() < 0.1, rng.randrange(31))


@dataclass(frozen=True)
class Config:
    """How a walk starts."""

    optimizer: str = "sgd"
    options: int = 0
    params: tuple[ParamSpec, ...] = (ParamSpec(),)
    groups: int = 1
    steps: int | None = 2
    max_norm: float | None = None
    skip: bool = True
    masters: str | None = None
    stochastic: bool = False
    bucket: float | None = None
    backend: str | None = None
    scaled: bool = False
    watches_skipped: bool = True  # reading it makes the device tables


def draw_config(rng: random.Random, backend: str | None) -> Config:
    optimizer = rng.choice(list(OPTIMIZERS))
    kind = OPTIMIZERS[optimizer]
    params = tuple(draw_param(rng) for _ in range(rng.randint(1, 4)))
    masters = rng.choice([None, None, "split", "fp32", "none", "none"])
    if all(p.frozen for p in params):
        params = (replace(params[0], frozen=False), *params[1:])
    steps = rng.choice(STEPS)
    return Config(
        optimizer,
        rng.randrange(len(kind.options)),
        params,
        rng.randint(1, min(2, len(params))),
        steps,
        rng.choice([None, None, 0.5, 1e4]),
        rng.random() < 0.75 or optimizer == "lion",
        masters,
        kind.is_fused and masters == "none" and rng.random() < 0.5,
        rng.choice([None, 1e-6]),
        backend,
        steps is not None and rng.random() < 0.15,
        rng.random() < 0.5,
    )


@dataclass
class World:
    """What the lines so far have made, as the oracle sees it."""

    config: Config
    oracle: Oracle = field(init=False)
    specs: list[ParamSpec] = field(init=False)
    shown: list[Tensor] = field(init=False)  # parameters, as they showed after the last line
    saved: Oracle | None = None
    plain: Update | None = None  # of the plain optimizer that loaded what was saved

    def __post_init__(self) -> None:
        config = self.config
        self.masters = config.masters
        self.specs = [self.fit(spec) for spec in config.params]
        self.shown = [spec.make().detach() for spec in self.specs]
        half = -(-len(self.specs) // config.groups)
        indices = list(range(len(self.specs)))
        layout = [indices[:half], indices[half:]] if config.groups == 2 else [indices]
        layout = [part for part in layout if part]
        params = [self.param(spec) for spec in self.specs]
        options = self.kind.options[config.options % len(self.kind.options)]
        update = Update(config.optimizer, params, layout, options)
        self.oracle = Oracle(update, config.steps, config.max_norm, config.skip)
        self.oracle.scaled = config.scaled

    @property
    def kind(self) -> Kind:
        return OPTIMIZERS[self.config.optimizer]

    def fit(self, spec: ParamSpec) -> ParamSpec:
        """`spec`, changed to what the optimizer and the masters take."""
        if self.masters == "split" and spec.dtype is F16:
            spec = replace(spec, dtype=BF16)
        numel = torch.Size(spec.shape).numel()
        is_slow = self.config.backend is not None and numel > 20
        if self.kind.is_2d or is_slow or not (numel or self.kind.takes_empty):
            spec = replace(spec, shape=(2, 3), layout="contiguous")
        return spec

    def param(self, spec: ParamSpec) -> Param:
        kind = master_kind(self.masters, spec.dtype, self.config.stochastic, self.kind.is_fused)
        value = spec.make().detach()
        exact = torch.nn.Parameter(value if kind == "native" else value.double())
        zero = torch.zeros_like(value, dtype=torch.float64)
        return Param(exact, spec.dtype, kind, not spec.frozen, zero, zero)

    def add(self, spec: ParamSpec, options: dict[str, Any]) -> str:
        """One more param group; the code of its parameter."""
        param = self.param(spec)
        update = self.oracle.update
        update.layout.append([len(self.specs)])
        update.params.append(param)
        update.plain.add_param_group({"params": [param.exact], **options})
        self.specs.append(spec)
        self.shown.append(spec.make().detach())
        self.oracle.add_params([param.needs_grad])
        return spec.code

    def convert(self, i: int, dtype: torch.dtype) -> str:
        """A parameter becomes what it shows, in another dtype; the name of that."""
        oracle, param = self.oracle, self.oracle.update.params[i]
        is_busy = oracle.in_window or oracle.broken or oracle.removed or oracle.has_assigned
        if is_busy or (not self.kind.is_fused and self.masters == "none"):
            raise Unspecified("a parameter that changes inside a window, or steps in its own dtype")
        if self.masters == "split" and dtype is F16:
            raise Unspecified("no split master of fp16")
        if dtype != param.dtype:
            oracle.update.forget_origins()
            self.specs[i] = replace(self.specs[i], dtype=dtype)
            self.shown[i] = self.shown[i].to(dtype)
            param.dtype = dtype
            param.kind = master_kind(
                self.masters, dtype, self.config.stochastic, self.kind.is_fused
            )
            lost = (param.value - self.shown[i].double()).abs() + param.error
            param.error = torch.zeros_like(lost)
            if param.has_master:  # one whose rounded value is what shows may stay
                oracle.update.stand_off(i, lost)
            param.exact.data.copy_(self.shown[i])
            for slot in oracle.slots:  # everything is built anew
                slot.is_attached = slot.needs_grad
            self.saved = None
        return _NAMES[dtype]

    # --- code ---

    def start(self) -> str:
        made = ", ".join(spec.code for spec in self.specs)
        scaler = ""
        if self.config.scaled:
            scaler = 'scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)\n'
            scaler += "scaler.scale(torch.ones(()))\n"
        return f"p = [{made}]\n{scaler}{self.wrap()}"

    def wrap(self) -> str:
        """Lines that wrap a new optimizer of the same groups."""
        options = self.kind.options[self.config.options % len(self.kind.options)]
        keywords = ", ".join(f"{name}={value!r}" for name, value in options.items())
        groups = ", ".join(
            '{"params": [' + ", ".join(f"p[{i}]" for i in part) + "]}"
            for part in self.oracle.update.layout
        )
        return f"inner = {self.kind.code}([{groups}], {keywords})\n{self.wrapper()}"

    def wrapper(self) -> str:
        oracle, config = self.oracle, self.config
        options = {
            "max_grad_norm": (oracle.max_norm, None),
            "master_weights": (self.masters, None),
            "skip_nonfinite": (oracle.skip, True),
            "backend": (config.backend, None),
            "bucket_cap_mb": (config.bucket, None),
            "stochastic_rounding": (config.stochastic and self.masters == "none", False),
        }
        keywords = "".join(f", {k}={v!r}" for k, (v, default) in options.items() if v != default)
        keywords += ", grad_scaler=scaler" if config.scaled else ""
        return f"opt = FusedAccumOptimizer(inner, {oracle.steps}{keywords})"

    def rewrap(self, steps: Any, max_norm: Any, skip: bool, masters: str | None) -> str:
        """A new wrapper of the plain optimizer, whose parameters are what they showed."""
        update = self.oracle.update
        update.forget_origins()
        if self.kind.is_fused:
            self.masters = masters
        stochastic = self.config.stochastic
        for param, shown in zip(update.params, self.shown, strict=True):
            param.kind = master_kind(self.masters, param.dtype, stochastic, self.kind.is_fused)
            if param.dtype != F32:
                param.exact.data.copy_(shown)
                param.error = torch.zeros_like(param.error)
        update.skipped, update.norm, update.norm_is_known = 0, None, True
        expected, slots, is_whole = self.oracle.expected, self.oracle.slots, self.oracle.is_whole
        self.oracle = Oracle(update, steps, max_norm, skip)
        self.oracle.is_whole = is_whole
        for slot, old in zip(self.oracle.slots, slots, strict=True):
            slot.needs_grad = slot.is_attached = old.needs_grad
        self.oracle.expected, self.oracle.scaled = expected, self.config.scaled
        self.saved = None
        return self.wrapper()
