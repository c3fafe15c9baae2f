"""What reaches Triton's driver when the backend launches, on a GPU that is not there.

    python -m tests.launches

The kernels are compiled for sm_90, as Triton does at a first launch, with a driver that loads
nothing and writes down what it is asked to launch. The first launch of everything goes through
Triton's own `kernel[grid](...)`; the later ones must ask the driver for the same.

The process must not have TRITON_INTERPRET=1, which the tests have: they run this as a subprocess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import LazyDict

from fusedaccum.backends import launcher
from fusedaccum.backends import triton as backend_module
from fusedaccum.backends.keep import Keep
from fusedaccum.backends.operations import Add, SumOfSquares
from fusedaccum.kernels.layout import CHUNK
from fusedaccum.kernels.norm import sum_of_squares_kernel
from fusedaccum.rules.builtin import RULES
from tests.ahead_of_time import TARGETS, Driver, one_tensor, zeros

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


class Noting(Driver):
    """A driver for a GPU that keeps what it is asked to launch in `launches`."""

    def __init__(self) -> None:
        super().__init__(TARGETS["sm_90"])
        self.stream = 7
        self.launches: list[tuple[Any, ...]] = []
        loaded = (object(), object(), 32, 0, 1024)  # module, function, registers, spills, threads
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: loaded,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *asked: self.launches.append(asked)

    def get_current_stream(self, device: object) -> int:
        return self.stream


@contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels of which Triton looks for the compiled one, by name."""
    names: list[str] = []
    run = triton.JITFunction.run

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **options)

    with mock.patch.object(triton.JITFunction, "run", noting):
        yield names


def operations() -> dict[str, tuple[str, Any]]:
    """Requests, each of another compiled kernel: the operation and what it is given."""
    found: dict[str, tuple[str, Any]] = {}
    control = torch.ones(2, dtype=FP32, device=CPU)
    for dtype, stores, norm, factor, is_aligned in (
        (BF16, False, False, None, True),
        (BF16, True, False, None, True),
        (BF16, False, True, None, True),
        (BF16, False, False, control, True),
        (BF16, False, False, None, False),
        (FP32, False, False, None, True),
    ):
        pairs = [(zeros(FP32, is_aligned), zeros(dtype, is_aligned))]
        sums = torch.zeros(2, dtype=FP32, device=CPU) if norm else None
        request = Add(pairs, 0.5, stores, sums, [0], factor)
        found[f"add {dtype} {stores} {norm} {factor is not None} {is_aligned}"] = (
            "accumulate",
            request,
        )
    sums = torch.zeros(2, dtype=FP32, device=CPU)
    found["sums"] = "sum_of_squares", SumOfSquares([zeros(BF16, True)], sums, [0])
    for rule, keep in (("adam", Keep.SPLIT), ("adam", Keep.FP32), ("sgd", Keep.SPLIT)):
        found[f"step {rule} {keep}"] = "step", one_tensor(RULES[rule], BF16, keep, True)
    return found


def same(first: Any, second: Any) -> bool:
    """Whether two launches ask for the same; of tensors, for the same ones."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    if isinstance(first, LazyDict) and isinstance(second, LazyDict):  # what profilers are told
        return bool(first.get() == second.get())
    return type(first) is type(second) and first == second


def check_each_kernel(driver: Noting, names: list[str]) -> None:
    """The first launch of each is Triton's own, and the second asks the driver for the same."""
    backend = backend_module.TritonBackend(CPU)
    requests = operations()
    for what, (operation, request) in requests.items():
        n_before = len(names)
        for _ in range(3):
            getattr(backend, operation)(request)
        (first, second, third), found = driver.launches, names[n_before:]
        driver.launches.clear()
        assert len(found) == 1, (what, found)
        assert len(first) == len(second) == len(third), what
        for asked in (second, third):
            assert all(map(same, first, asked)), (what, first, asked)
    # All of them again, in turns: none took the place of another.
    functions = []
    for _ in range(2):
        for operation, request in requests.values():
            getattr(backend, operation)(request)
        functions.append([asked[5] for asked in driver.launches])
        driver.launches.clear()
    assert functions[0] == functions[1]
    assert len(names) == len(requests), names


def check_what_changes(driver: Noting, names: list[str]) -> None:
    """What may change between two launches is that of the launch: numbers, tensors, the stream,
    the hooks of a profiler; and pointers for which another kernel would be compiled."""
    backend = backend_module.TritonBackend(CPU)
    pairs = [(zeros(FP32, True), zeros(BF16, True))]
    sums = torch.zeros(5, dtype=FP32, device=CPU)
    for scale in (0.5, 1):
        backend.accumulate(Add(pairs, scale, False, sums[:2], [0]))
    driver.stream = 8
    entered = mock.Mock()
    with mock.patch.object(knobs.runtime, "launch_enter_hook", entered):
        backend.accumulate(Add(pairs * 3, 0.25, False, sums[:4], [0] * 3))
    assert names == ["accumulate_kernel"], names
    first, second, third = driver.launches
    assert [launch[0] for launch in driver.launches] == [2, 2, 6]
    assert [launch[3] for launch in driver.launches] == [7, 7, 8]
    scales = [launch[13] for launch in driver.launches]
    assert scales == [0.5, 1.0, 0.25] and {type(scale) for scale in scales} == {float}
    assert first[7] is second[7] is not entered and third[7] is entered
    driver.launches.clear()
    for _ in range(2):
        backend.accumulate(Add(pairs, 0.5, False, sums[1:3], [0]))  # 4 bytes beside a multiple
    assert names == ["accumulate_kernel"] * 3, names
    with mock.patch.object(backend_module, "ACCUMULATE_BLOCK", 1024):
        backend.accumulate(Add(pairs, 0.5, False, sums[:2], [0]))
    assert len(names) == 4 and driver.launches[-1][-1] == 1024
    driver.launches.clear()
    driver.stream = 7


def check_order(driver: Noting, names: list[str]) -> None:
    """Constants in another order than the kernel's are left to Triton, which goes by name."""
    own = launcher.Launcher()
    table, chunks = (torch.zeros(8, dtype=d, device=CPU) for d in (torch.int64, torch.int32))
    sums = torch.zeros(2, dtype=FP32, device=CPU)
    constants = {"BLOCK": 2048, "CHUNK": CHUNK, "VECTOR": 8, "DTYPE": triton.language.bfloat16}
    for _ in range(2):
        own.launch(sum_of_squares_kernel, 1, (table, chunks, sums), num_warps=4, **constants)
    first, second = driver.launches
    driver.launches.clear()
    assert len(names) == 2 and all(map(same, first, second))


def main() -> None:
    driver = Noting()
    triton.runtime.driver.set_active(driver)
    for check in (check_each_kernel, check_what_changes, check_order):
        with counted() as names:
            check(driver, names)
            print(f"{check.__name__}: {len(names)} of Triton's own launches")


if __name__ == "__main__":
    main()
