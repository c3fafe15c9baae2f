"""Device copies of small host arrays, and what a CUDA graph's capture asks of them."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedaccum.backends import Add, Keep, Launch, Step, StepTensor, UpdateScalars, tables
from fusedaccum.backends import mirror as mirrors
from fusedaccum.backends.mirror import Mirror
from fusedaccum.backends.tables import LaunchTable, Tables
from fusedaccum.kernels import layout
from fusedaccum.kernels.layout import CHUNK
from fusedaccum.rules.builtin import RULES

CPU = torch.device("cpu")
HOST = np.array([[1, 2], [3, 4]])


def test_numbers_are_uploaded_where_they_change() -> None:
    mirror = Mirror(CPU)
    first = mirror.set(HOST)
    assert first.tolist() == HOST.tolist()
    first.fill_(9)  # what an upload would overwrite
    assert mirror.set(HOST.copy()) is first and first.tolist() == [[9, 9], [9, 9]]
    assert mirror.set(HOST + 1) is first and first.tolist() == (HOST + 1).tolist()
    assert mirror.set(HOST[0]).tolist() == [1, 2]


@contextmanager
def capture() -> Iterator[None]:
    """What is done inside counts as done in a CUDA graph's capture."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (mirrors, tables):
            patch.setattr(module, "is_capturing", lambda device: True)
        yield


def test_numbers_that_were_captured_are_uploaded_at_each_use() -> None:
    """Captured copies run at replays: before one, the device has not seen the numbers; after each,
    it has the graph's, whatever was uploaded in between."""
    mirror = Mirror(CPU)
    mirror.set(HOST).fill_(9)
    with capture():
        assert mirror.set(HOST).tolist() == HOST.tolist()
        mirror.tensor.fill_(9)
        assert mirror.set(HOST).tolist() == HOST.tolist()
    for _ in range(3):
        mirror.tensor.fill_(9)  # a replay
        assert mirror.set(HOST).tolist() == HOST.tolist()


def test_numbers_that_never_change_are_not_part_of_a_capture() -> None:
    """Pinned memory of captured copies is never freed: of a large model's chunks that would be
    megabytes for each graph."""
    early, late = Mirror(CPU), Mirror(CPU)
    early.keep(HOST).fill_(9)
    with capture():
        assert early.keep(HOST).tolist() == [[9, 9], [9, 9]]
        assert late.keep(HOST).tolist() == HOST.tolist()
    late.tensor.fill_(9)  # its copy was captured and has not run
    assert late.keep(HOST).tolist() == HOST.tolist()
    late.tensor.fill_(9)
    assert late.keep(HOST).tolist() == [[9, 9], [9, 9]]


def test_what_a_graph_reads_is_kept() -> None:
    mirror = Mirror(CPU)
    with capture():
        captured = weakref.ref(mirror.set(HOST))
    mirror.set(HOST[0])  # of another shape: another tensor
    assert captured() is not None
    eager = weakref.ref(mirror.tensor)
    mirror.set(HOST)
    assert eager() is None


def add(acc: Tensor, grad: Tensor, launch: Launch | None) -> Add:
    return Add([(acc, grad)], 1.0, stores=False, launch=launch)


def rows_of(owner: Tables, request: Add) -> list[list[int]]:
    (table,) = owner.of_add(request)
    return table.rows.tolist()


@pytest.mark.parametrize("comes_again", [True, False])
def test_an_eager_launch_between_replays_has_its_own_addresses(comes_again: bool) -> None:
    owner, launch = Tables(CPU), Launch() if comes_again else None
    acc, own, graphs = torch.zeros(3, 5).unbind()
    expected = rows_of(owner, add(acc, own, launch))
    with capture():
        (table,) = owner.of_add(add(acc, graphs, launch))
        captured = table.rows.clone()
    assert captured.tolist() != expected
    for _ in range(3):
        table.rows.copy_(captured)  # a replay
        assert rows_of(owner, add(acc, own, launch)) == expected


def test_a_table_that_a_graph_reads_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TABLES", 2)
    owner, grad = Tables(CPU), torch.zeros(5)
    accs = torch.zeros(6, 5).unbind()
    with capture():
        (table,) = owner.of_add(add(accs[0], grad, None))
        captured = weakref.ref(table)
    (table,) = owner.of_add(add(accs[1], grad, None))
    eager = weakref.ref(table)
    del table
    for acc in accs[2:]:
        rows_of(owner, add(acc, grad, None))
    gc.collect()
    assert captured() is not None and eager() is None


def test_a_step_that_keeps_no_table_finds_that_of_before() -> None:
    """The functions, shards, and rules that start as a hyper-parameter does."""
    owner, (param, acc) = Tables(CPU), torch.zeros(2, 5).unbind()
    rule, scalars = RULES["sgd"], UpdateScalars(1, 0, CPU)
    (first,), (second,) = (
        owner.of_step(Step(rule, Keep.PARAM, [StepTensor(param, acc, (), 0, 0)], scalars))
        for _ in range(2)
    )
    assert first is second


def test_a_launch_that_comes_again_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, launch, made = Tables(CPU), Launch(), []
    make = LaunchTable.__init__
    monkeypatch.setattr(
        LaunchTable, "__init__", lambda table, *args: (made.append(table), make(table, *args))[1]
    )
    acc, *grads = torch.zeros(4, 16).unbind()
    for grad in (*grads, grads[0]):
        rows = rows_of(owner, add(acc, grad, launch))
        assert rows == [[grad.data_ptr(), acc.data_ptr(), 16, 0]]
    assert len(made) == 1
    (table,) = owner.of_add(add(acc, torch.zeros(17)[1:], launch))
    assert not table.is_aligned
    (table,) = owner.of_add(add(acc, grads[0], launch))
    assert table.is_aligned


def test_a_launch_table_covers_each_tensor_with_chunks() -> None:
    numels = [0, 1, CHUNK, CHUNK + 1]
    rows = np.arange(8, dtype=np.int64).reshape(4, 2) * 16
    table = LaunchTable(torch.float32, rows, numels, (0,), CPU)
    assert table.chunks.tolist() == [[1, 0], [2, 0], [3, 0], [3, 1]]
    assert table.n_elements == sum(numels) and table.is_aligned
    table.update(rows + 8)
    assert not table.is_aligned and table.rows.tolist() == (rows + 8).tolist()


def test_the_numbers_of_the_layout_are_written_nowhere_else() -> None:
    """Those that can only mean that, in any spelling, in the text of the C loops too."""
    numbers = {n for n in vars(layout).values() if isinstance(n, int) and n > 255}
    assert {layout.CHUNK, layout.GOLDEN, layout.ROUND_HALF} <= numbers
    root = Path(__file__).resolve().parents[2]
    found = set()
    rooms = "kernels fusedaccum/rules fusedaccum/backends fusedaccum/window fusedaccum/update"
    for path in (path for room in rooms.split() for path in (root / room).rglob("*.py")):
        code = re.sub(r'^ *"""[^"]*"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.M)
        for word in re.findall(r"\b(?:0x[0-9a-fA-F]+|[1-9][\d_]*)", code):
            if int(word, 0) in numbers:
                found.add(path.name)
    assert found == {"layout.py"}
