"""Layers whose weight gradient goes from the GEMM into the accumulator: Linear, and Conv1D.

    y = x Wᵀ + b        W.grad += scale dyᵀ x        (transformers' Conv1D keeps Wᵀ as its weight)

The class of such a module is swapped for a subclass with another forward, and its state dict, its
repr and what `isinstance` says stay. A copy and a pickle of the module are of the stock class.
"""

from __future__ import annotations

import copyreg
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backends.private import tracing_state, transform
from .linear_traced import KEY, remember, traced_forward
from .products import Products

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Forward = Callable[[Any, Tensor], Tensor]


class Use(NamedTuple):
    """One use of a layer in a forward.

    Attributes:
        products: takes the gradient of its weight; held weakly, as a graph may live longer.
        weight: the parameter. What autograd saves may come back as another tensor object.
        is_transposed: whether the weight is [in, out].
    """

    products: weakref.ref[Products]
    weight: Tensor
    is_transposed: bool


class _Linear(torch.autograd.Function):
    """`F.linear` that saves what it saves, and gives no gradient of the weight where that was
    taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, use: Use) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        ctx.use = use
        if not use.is_transposed:
            y = F.linear(x, w, bias)
        else:
            rows = x.view(-1, x.shape[-1])
            y = rows.mm(w) if bias is None else torch.addmm(bias, rows, w)
            y = y.view(*x.shape[:-1], y.shape[-1])
        # A view that comes out of a function could not be changed in place (ReLU(inplace=True)).
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, _ = ctx.needs_input_grad
        use: Use = ctx.use
        rows = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        dx = dw = None
        if needs_x:
            dx = rows.mm(w.t() if use.is_transposed else w)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        if needs_w:
            inputs = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            a, b = (inputs.t(), rows) if use.is_transposed else (rows.t(), inputs)
            products = use.products()
            if products is None or not products.take(use.weight, a, b):
                dw = a.mm(b)
        return dx, dw, rows.sum(0) if needs_bias else None, None


def _forward(module: Any, x: Tensor, stock: Forward, is_transposed: bool) -> Tensor:
    """The forward of a swapped module; `stock` where its weight gradient is not taken."""
    if torch.compiler.is_compiling():
        traced = traced_forward(module, x, is_transposed)
        return stock(module, x) if traced is None else traced
    products_ref, parameters = module.__dict__.get(KEY), module._parameters
    products = None if products_ref is None else products_ref()
    weight = parameters.get("weight")
    if (
        products is None
        or weight is None
        or not torch.is_grad_enabled()
        or not weight.requires_grad
        or products.slot_of(weight) is None
        or type(x) not in (Tensor, nn.Parameter)
        or x.layout is not torch.strided
        or transform() is not None
        or forward_ad._current_level >= 0
        or tracing_state() is not None
    ):
        return stock(module, x)
    try:
        bias = parameters["bias"]
    except KeyError:  # it is computed: pruning and parametrizations may do that to the bias alone
        bias = module.bias
    w, device = weight, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if x.dtype not in FLOATS:  # autocast leaves it as it is, and what follows raises
            return stock(module, x)
        x, w = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype is not weight.dtype:
        return stock(module, x)
    apply: Callable[..., Tensor] = _Linear.apply
    return apply(x, w, bias, Use(products_ref, weight, is_transposed))


class Swapped:
    """What a swapped class is known by."""

    stock: type[nn.Module]


@cache
def _swapped(stock: Any, is_transposed: bool) -> Any:
    """A subclass of `stock` that takes products. Its name is the same, for repr."""
    plain: Forward = stock.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return _forward(self, x, plain, is_transposed)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != KEY}
        return copyreg._reconstructor, (stock, object, None), state  # type: ignore[attr-defined]

    names = {"forward": forward, "__reduce_ex__": reduce, "stock": stock, "__doc__": stock.__doc__}
    return type(stock.__name__, (Swapped, stock), names)


def _kinds() -> dict[type[nn.Module], bool]:
    """The classes that are swapped, each with whether its weight is [in, out]."""
    kinds: dict[type[nn.Module], bool] = {nn.Linear: False}
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None:
        kinds[conv1d] = True
    return kinds


def swap(module: nn.Module, products: Products) -> None:
    """Have a module's weight gradient taken by `products`, which it does not keep alive."""
    stock: Any = type(module)
    vars(module)[KEY] = weakref.ref(products)
    remember(module)
    module.__class__ = _swapped(stock, _kinds()[stock])


def swap_back(module: nn.Module) -> None:
    """Make it what it was; one that is not swapped stays."""
    if not isinstance(module, Swapped):
        return
    if "stock" in vars(type(module)):  # else somebody, FSDP2 say, derived a class from ours
        module.__class__ = module.stock  # type: ignore[assignment]
    vars(module).pop(KEY, None)


def is_swapped_for(module: nn.Module, products: Products) -> bool:
    """Whether `products` takes a module's weight gradient."""
    return isinstance(module, Swapped) and vars(module).get(KEY, lambda: None)() is products


def is_linear(module: nn.Module) -> bool:
    """Whether it is of a class that is swapped, or of one that is derived from such a class."""
    return isinstance(module, tuple(_kinds()))


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be swapped, whatever its weight is; None if it can."""
    if isinstance(module, Swapped) and KEY in vars(module):
        return "fused for another optimizer"
    if type(module) not in _kinds():
        return f"a subclass: {type(module).__name__}, which may do anything with its weight"
    if "forward" in vars(module):
        return "a replaced forward: somebody assigned module.forward"
    if module._parameters.get("weight") is None:
        return "a computed weight: weight_norm or pruning makes it in each forward"
    return None
