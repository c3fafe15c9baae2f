"""What is installed, which devices there are, and what a user should know about both."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..backends.compiled import compiler, store
from ..backends.compiled import engine as native
from ..backends.compiled import source as cgen
from ..backends.operations import GRAD_DTYPES

MIN_TORCH, MIN_TRITON = (2, 11), (3, 6)
# Triton's kernels need 7.0; it tests, and converts bf16 in hardware, from 8.0 on.
MIN_CAPABILITY, NATIVE_BF16_CAPABILITY = (7, 0), (8, 0)


def installed() -> dict[str, Any]:
    """Versions, the C compiler and the OpenMP runtime."""
    return {
        "fusedaccum": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": version_of("numpy"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpu_driver": driver(),
        "c_compiler": _compiler(),
        "c_cache": str(store.folder() or "nowhere: there is no home directory"),
        "openmp": _openmp(),
    }


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it cannot be imported."""
    try:
        return str(importlib.import_module(package).__version__)
    except (ImportError, AttributeError):
        return None


def first_line(*command: str) -> str:
    """The first line that a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0].strip()


@cache
def driver() -> str | None:
    """The NVIDIA or AMD driver of this machine, whatever torch was built for."""
    found = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if found:
            break
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError:
            continue
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
        found = version[0] if version else ""
    return found or None


def _compiler() -> str | None:
    command = compiler.find()
    if command is None:
        return None
    try:
        version = native.compiler_version(command).strip().partition("\n")[0]
    except (compiler.CompilerMissing, OSError) as error:
        version = str(error)
    return f"{shlex.join(command)} ({version})"


def _openmp() -> str | None:
    """The OpenMP runtime that the compiled loops run on, None where they take one thread."""
    if native._openmp() is None:
        return None
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    names = {Path(line.split()[-1]).name for line in maps.splitlines() if "libgomp" in line}
    return ", ".join(sorted(names))


def cpu_path(dtype: torch.dtype) -> tuple[str, str]:
    """How the torch backend serves a CPU tensor, and why."""
    try:
        native.load(cgen.reduce_source(dtype))
    except compiler.CompilerMissing as error:
        return "ATen blocks", str(error)
    return "compiled C loops", f"made by {shlex.join(compiler.find() or ())}"


def backend_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The backend that a tensor takes, how, and why."""
    name, because = backends.why(None, device)
    if name == "triton":
        return {"backend": name, "path": "Triton kernels", "why": because}
    path, detail = cpu_path(dtype) if device.type == "cpu" else ("ATen blocks", "not a CPU")
    return {"backend": name, "path": path, "why": f"{because}; {detail}"}


def available() -> list[torch.device]:
    """The CPU, every CUDA (or HIP) device, and what else torch has."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    else:
        other = torch.accelerator.current_accelerator(check_available=True)
        found += [torch.device(other.type, 0)] if other is not None else []
    return found


def choose(wanted: str | None) -> list[torch.device]:
    """The devices that were asked for; of None the GPUs, or where there is none the CPU.

    Raises:
        ValueError: naming what there is.
    """
    found = available()
    if wanted is None:
        return [device for device in found if device.type == "cuda"] or found[:1]
    matching = [device for device in found if wanted in (str(device), device.type)]
    if not matching:
        names = ", ".join(str(device) for device in found)
        raise ValueError(f"--device got {wanted!r}; there is here: {names}")
    return matching


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size, and the backend of each dtype."""
    facts: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    elif device.type == "cpu":
        facts |= {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "usable_cores": usable_cores(),
            "memory_gib": round(memory_bytes(device) / 2**30, 1),
        }
    else:
        facts["name"] = device.type
    facts["backends"] = {
        str(dtype).removeprefix("torch."): backend_of(device, dtype) for dtype in GRAD_DTYPES
    }
    return facts


def cpu_name() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """Memory that can be had now: of a GPU what is free, of a CPU what the system or the container
    leaves."""
    if device.type == "cuda":
        # What torch's allocator has cached is free to this process too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free: list[int] = []
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free += [int(kib) << 10 for kib in re.findall(r"^MemAvailable:\s*(\d+)", text, re.M)]
    except OSError:
        pass
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit and used and limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    if not free and hasattr(os, "sysconf"):  # macOS
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free)) if free else 0


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and its container's quota."""
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    quota = _cgroup("cpu.max")
    if quota and not quota.startswith("max"):
        microseconds, period = quota.split()
        cores = min(cores, int(microseconds) / int(period))
    return cores


def _cgroup(name: str) -> str | None:
    """A limit of this container."""
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").strip()
    except OSError:
        return None


# --- what a user should know ---


def warnings() -> list[str]:
    """What works, but slowly or not as one would think; each says what to do."""
    return [*_version_warnings(), *_cpu_warnings(), *_gpu_warnings()]


def _older(version: str | None, least: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return found is not None and (int(found[1]), int(found[2])) < least


def _version_warnings() -> list[str]:
    found = []
    for name, version, least in (
        ("torch", torch.__version__, MIN_TORCH),
        ("triton", version_of("triton"), MIN_TRITON),
    ):
        if _older(version, least):
            wanted = ".".join(map(str, least))
            found.append(f"{name} {version} is older than {wanted}, with which nothing is tested")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found.append(
            "TRITON_INTERPRET is set: Triton runs its interpreter, thousands of times slower, and "
            "cuts bf16 off where GPUs round; unset it but for debugging kernels"
        )
    return found


def _cpu_warnings() -> list[str]:
    found = []
    path, because = cpu_path(torch.float32)
    if path != "compiled C loops":
        found.append(
            f"CPU: {because}; ATen blocks take about 1.7 times as long to accumulate bf16 and 4 "
            "times to step. Install a C compiler (or unset FUSEDACCUM_CC)"
        )
    elif reason := store.why_not():
        found.append(
            f"CPU: {reason}, so every process compiles its loops anew, 0.1 s each; set "
            "XDG_CACHE_HOME to a folder of your own that can be written"
        )
    threads, cores = torch.get_num_threads(), usable_cores()
    if threads > cores:
        found.append(
            f"CPU: torch uses {threads} threads where this process may use {cores:g} cores; they "
            f"wait for each other. Set OMP_NUM_THREADS={max(1, int(cores))}"
        )
    elif threads * 2 < cores:
        why = os.environ.get("OMP_NUM_THREADS")
        setting = f" (OMP_NUM_THREADS={why})" if why else ""
        found.append(
            f"CPU: torch uses {threads} threads of {cores:g} cores{setting}; if this process has "
            "them alone, set OMP_NUM_THREADS higher. torchrun sets it to 1"
        )
    if path == "compiled C loops" and native._openmp() is None and threads > 1:
        found.append(
            "CPU: torch's OpenMP runtime (libgomp) was not found; the compiled loops run on one "
            f"thread of {threads}"
        )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" and is_busy():
        found.append(
            "CPU: OMP_WAIT_POLICY=ACTIVE on a machine with other work to do: threads spin and keep "
            "cores from it; set it to PASSIVE"
        )
    return found


def is_busy() -> bool:
    """Whether other processes take half of the cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * usable_cores()


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _gpu_warnings() -> list[str]:
    found = []
    if not torch.cuda.is_available():
        if driver():
            build = torch.version.cuda or torch.version.hip
            reason = f"is built for {build}, newer than the driver" if build else "is a CPU build"
            found.append(
                f"there is a GPU driver ({driver()}), but torch {torch.__version__} {reason}: "
                "the GPU is not used. See pytorch.org/get-started for the right build"
            )
        return found
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if not is_writable(cache):
        found.append(
            f"{cache} cannot be written: Triton needs it to keep compiled kernels; set "
            "TRITON_CACHE_DIR to a folder that can"
        )
    for device in available()[1:]:
        name = torch.cuda.get_device_name(device)
        backend, because = backends.why(None, device)
        if backend != "triton":
            found.append(f"{device} ({name}) takes slow ATen blocks: {because}")
        if torch.version.cuda is None:
            continue
        capability = torch.cuda.get_device_capability(device)
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        shown = ".".join(map(str, capability))
        if capability < MIN_CAPABILITY:
            found.append(
                f"{device} ({name}) has compute capability {shown}, which Triton does not serve; "
                'pass backend="torch"'
            )
        elif capability < NATIVE_BF16_CAPABILITY or not is_native:
            found.append(
                f"{device} ({name}, compute capability {shown}) emulates bf16: slow, and Triton "
                "supports GPUs from 8.0 on; prefer fp16 with a GradScaler, or fp32"
            )
    return found
