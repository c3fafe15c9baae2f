"""An optimizer that shares everything with another one."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer


def _wrapper(kind: type[Any]) -> type[Any]:
    """The class whose constructor takes the optimizer to wrap; a subclass may take parameters."""
    return next(k for k in kind.__mro__ if SharingOptimizer in k.__bases__)


def _rebuild(kind: Any, optimizer: Optimizer, options: Any, state: Any) -> Any:
    """What `__reduce__` asks for."""
    wrapper = kind.__new__(kind)
    _wrapper(kind).__init__(wrapper, optimizer, **options)
    wrapper.load_state_dict(state)
    return wrapper


class SharingOptimizer(Optimizer):
    """Shows the wrapped optimizer's `param_groups`, `state`, `defaults` and hooks as its own.

    They are looked up each time: torch's `load_state_dict` replaces them on the wrapped one.
    `Optimizer.__init__` is not called, since everything it makes is the wrapped optimizer's.
    """

    optimizer: Optimizer

    def __reduce__(self) -> Any:
        """Pickle and deepcopy: the wrapped optimizer wrapped anew, with its state."""
        # The constructor keeps each of its options under its own name.
        _, *names = inspect.signature(_wrapper(type(self))).parameters
        options = {name: getattr(self, name) for name in names}
        return _rebuild, (type(self), self.optimizer, options, self.state_dict())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own list."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's own dict. States are fp32 views of flat buffers."""
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's own dict."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        # Hook dicts, and whatever a subclass has; asked only for what is not ours.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: False lets it unscale `p.grad`, once per window, before step().

        Where the wrapper counts the window it would do so at every micro-batch, to the whole sum;
        True has it hand over its scale instead, and `_refuse_scaler` sees that.
        """
        return getattr(self, "gradient_accumulation_steps", None) is not None

    def _refuse_scaler(self) -> None:
        """Raise if a GradScaler called step() where the wrapper counts the window."""
        if "found_inf" in self.__dict__:
            del self.found_inf, self.grad_scale
            raise RuntimeError(
                "GradScaler.step() is called at every micro-batch and does not know of the window "
                "that gradient_accumulation_steps=N counts; nothing was updated. Use "
                "gradient_accumulation_steps=None, divide the loss by N, and call scaler.step() "
                "once per window. bf16 needs no GradScaler"
            )

    @contextmanager
    def _step_hooks(self) -> Iterator[None]:
        """What torch does around a step(): a profiler record, and the hooks of both kinds."""
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            before = (
                torch_optimizer._global_optimizer_pre_hooks,
                self.optimizer._optimizer_step_pre_hooks,
            )
            for hook in chain.from_iterable(hooks.values() for hooks in before):
                hook(self, (self,), {})
            yield
            after = (
                self.optimizer._optimizer_step_post_hooks,
                torch_optimizer._global_optimizer_post_hooks,
            )
            for hook in chain.from_iterable(hooks.values() for hooks in after):
                hook(self, (self,), {})
        # A scheduler made on the wrapped optimizer looks here for whether step() was called.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
