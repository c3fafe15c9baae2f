"""The accesses of a kernel's full-chunk path to tensors: gradients, accumulators, parameters,
masters, states.

That path has no mask, so in PTX those are the accesses without a predicate; and because tables and
scalars are kernel arguments and tensors are addresses that were loaded from a table, they are those
whose address does not come from an argument. AMD assembly has no predicates: there only 128-bit
accesses are counted (the tail has none), for tensors wide enough to give each of a wavefront's 64
threads 128 bits: fp32.
"""

from __future__ import annotations

import re
from typing import Any

from triton.backends.compiler import GPUTarget

from fusedaccum.backends.triton import LONE_VECTOR
from fusedaccum.kernels.layout import VECTOR_BYTES

_PREDICATE = r"(@!?%p\d+\s+)?"
_ACCESS = re.compile(_PREDICATE + r"(ld|st)\.global([.\w:]*)\s+(.*)$")
# What an instruction computes, and what from. A loaded value has no sources of its own: where it
# was loaded from is of no interest.
_COMPUTED = re.compile(_PREDICATE + r"(?!ld|st|atom|red)[a-z][\w.:]*\s+(\{[^}]*\}|[^,]+),(.*)$")
_REGISTER = re.compile(r"%[a-z]+\d+")


def ptx_widths(ptx: str) -> dict[str, list[int]]:
    """Bytes of each load and of each store that goes to a tensor and has no predicate."""
    from_arguments: set[str] = set()
    sources: dict[str, set[str]] = {}
    found = []
    for line in (raw.split("//")[0].strip() for raw in ptx.splitlines()):
        access = _ACCESS.match(line)
        if access:
            predicate, kind, modifiers, operands = access.groups()
            address = re.search(r"\[\s*(%\w+)", operands)
            assert address, f"no address in {line!r}"
            if not predicate:
                found.append((kind, _width(modifiers), address[1]))
        elif line.startswith("ld.param"):
            from_arguments.update(_REGISTER.findall(line))
        elif computed := _COMPUTED.match(line):
            for register in _REGISTER.findall(computed[2]):
                sources.setdefault(register, set()).update(_REGISTER.findall(computed[3]))
    widths: dict[str, list[int]] = {"loads": [], "stores": []}
    for kind, width, address in found:
        if not from_arguments & _origins(address, sources):
            widths["loads" if kind == "ld" else "stores"].append(width)
    return widths


def _width(modifiers: str) -> int:
    """Bytes of an access: `.v4.b32` is 16."""
    vector = re.search(r"\.v(\d)", modifiers)
    bits = re.search(r"\.[bfsu](\d+)$", modifiers)
    assert bits, f"unknown access {modifiers!r}"
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _origins(register: str, sources: dict[str, set[str]]) -> set[str]:
    """`register` and all that it is computed from. A loop makes this a graph with circles."""
    seen, queue = {register}, [register]
    while queue:
        new = sources.get(queue.pop(), set()) - seen
        seen |= new
        queue.extend(new)
    return seen


def faults(
    kwargs: dict[str, Any],
    loads: tuple[int, ...],
    stores: tuple[int, ...],
    target: GPUTarget,
    widths: dict[str, list[int]],
) -> list[str]:
    """What is wrong with the widths (bytes) of the full-chunk path's accesses.

    Every access to a tensor has to be as wide as its hint allows, 128 bits of fp32, or wider; and
    together they have to be the bytes that a thread moves in one block, or in several where the
    compiler has unrolled the loop: an access that went elsewhere (behind a predicate, say) is
    missing.

    Args:
        kwargs: of the launch: BLOCK, CHUNK, VECTOR, num_warps.
        loads, stores: bytes per element of each tensor that it reads and writes.
        target: what it was compiled for.
        widths: from `ptx_widths`.
    """
    found, unrolled = [], set()
    vector = kwargs.get("VECTOR") or LONE_VECTOR
    threads = kwargs["num_warps"] * target.warp_size
    for kind, itemsizes in (("loads", loads), ("stores", stores)):
        # Of each tensor: the bytes of one access, and those of a thread in a block.
        tensors = [
            (min(VECTOR_BYTES, vector * itemsize), kwargs["BLOCK"] * itemsize // threads)
            for itemsize in itemsizes
        ]
        if target.backend == "hip":  # where only the widest are counted
            tensors = [pair for pair in tensors if min(pair) >= VECTOR_BYTES]
        expected, moved = sum(share for _, share in tensors), sum(widths[kind])
        for least in sorted({width for width, _ in tensors}):
            narrow = [width for width in widths[kind] if width < least]
            allowed = sum(share for width, share in tensors if width < least)
            if sum(narrow) * expected > allowed * moved:
                found.append(f"{kind} of {sorted({8 * width for width in narrow})} bits")
        if expected:
            unrolled.add(moved / expected)
        elif moved:
            found.append(f"{moved} bytes in {kind}, expected none")
    blocks = kwargs.get("CHUNK", 0) // kwargs["BLOCK"]
    if unrolled and not (len(unrolled) == 1 and unrolled <= set(range(1, blocks + 1))):
        found.append(f"loads and stores of {sorted(unrolled)} blocks, expected the same few")
    return found
