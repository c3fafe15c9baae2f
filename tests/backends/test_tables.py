"""Device copies of small host arrays, and what a CUDA graph's capture asks of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedaccum.backends.tables import LaunchTable, Mirror
from fusedaccum.kernels import layout
from fusedaccum.kernels.layout import CHUNK

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


@pytest.mark.parametrize("method", ["set", "keep"])
def test_a_capture_uploads_always_and_leaves_nothing_to_rely_on(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured copies run at replays: before one, the device has not seen the numbers; after one of
    another graph, it has seen others."""
    mirror = Mirror(CPU)
    upload = getattr(mirror, method)
    upload(HOST).fill_(9)
    with monkeypatch.context() as capture:
        capture.setattr(Mirror, "_is_capturing", lambda self: True)
        assert upload(HOST).tolist() == HOST.tolist()
        mirror.tensor.fill_(9)
        assert upload(HOST).tolist() == HOST.tolist()
    mirror.tensor.fill_(9)  # the capture's copy did not run
    assert upload(HOST).tolist() == HOST.tolist()
    mirror.tensor.fill_(9)
    assert upload(HOST).tolist() == [[9, 9], [9, 9]]


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
