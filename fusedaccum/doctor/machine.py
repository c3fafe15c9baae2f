"""What is installed, which devices there are, and what a user should know about both."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from .. import __version__, backends
from ..backends.compiled import compiler, libraries, openmp, source, store
from ..backends.operations import GRAD_DTYPES

# Triton's kernels need 7.0; it tests, and converts bf16 in hardware, from 8.0 on.
MIN_TORCH, MIN_TRITON = (2, 11), (3, 6)
MIN_CAPABILITY, NATIVE_BF16_CAPABILITY = (7, 0), (8, 0)
CGROUP = "/sys/fs/cgroup"  # the limits of this container


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
        "openmp": "torch's own" if openmp.runtime() else None,
    }


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it cannot be imported."""
    try:
        return str(importlib.import_module(package).__version__)
    except (ImportError, AttributeError):
        return None


@cache
def driver() -> str | None:
    """The NVIDIA or AMD driver of this machine, whatever torch was built for."""
    found: str | None = collect_env.get_nvidia_driver_version(collect_env.run)
    amd = re.search(r"\b\d+\.\d+(\.\d+)?\b", _text("/sys/module/amdgpu/version"))
    return found or (amd[0] if amd else None)


def _compiler() -> str | None:
    command = compiler.find()
    if command is None:
        return None
    try:
        version = libraries.compiler_version(command).strip().partition("\n")[0]
    except (compiler.CompilerMissing, OSError) as error:
        version = str(error)
    return f"{shlex.join(command)} ({version})"


def cpu_path(dtype: torch.dtype) -> tuple[str, str]:
    """How the torch backend serves a CPU tensor, and why."""
    try:
        libraries.load(source.reduce_source(dtype))
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
    """The CPU, and every accelerator: CUDA's (or HIP's) devices, or Apple's, or another's."""
    found = [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        found += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return found


def choose(wanted: str | None) -> list[torch.device]:
    """The devices that were asked for; of None all.

    Raises:
        ValueError: naming what there is.
    """
    found = available()
    matching = [device for device in found if wanted in (None, str(device), device.type)]
    if not matching:
        names = ", ".join(str(device) for device in found)
        raise ValueError(f"--device got {wanted!r}; there is here: {names}")
    return matching


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size in words, and the backend of each dtype."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = f"capability {properties.major}.{properties.minor}, "
        size += f"{properties.total_memory / 2**30:.1f} GiB"
    elif device.type != "cpu":
        size = "memory not known"
    else:
        size = f"{torch.get_num_threads()} threads on {usable_cores():g} cores, "
        size += f"{memory_bytes(device) / 2**30:.1f} GiB free"
    taken = {str(dtype).removeprefix("torch."): backend_of(device, dtype) for dtype in GRAD_DTYPES}
    return {"device": str(device), "name": name_of(device), "size": size, "backends": taken}


def name_of(device: torch.device) -> str:
    """The GPU's or the processor's name, or the kind of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """Memory that can be had now: of a GPU what is free, of a CPU what the system or the container
    leaves; 0 where nobody says."""
    if device.type == "cuda":
        # What torch's allocator has cached is free to this process too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return 0
    kib = re.findall(r"^MemAvailable:\s*(\d+)", _text("/proc/meminfo"), re.MULTILINE)
    free = [int(number) << 10 for number in kib]
    limit, used = _text(f"{CGROUP}/memory.max"), _text(f"{CGROUP}/memory.current")
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return max(0, min(free, default=0))


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and its container's quota."""
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _text(f"{CGROUP}/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() else cores


def _text(path: str) -> str:
    """What Linux says there; nothing elsewhere."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


# --- what a user should know ---


def warnings() -> list[str]:
    """What works, but slowly or not as one would think; each says what to do."""
    found = [*_version_warnings(), *_cpu_warnings(), *_gpu_warnings()]
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found.append(
            "TRITON_INTERPRET is set: Triton runs its interpreter, thousands of times slower, and "
            "cuts bf16 off where GPUs round; unset it but for debugging kernels"
        )
    return found


def _version_warnings() -> list[str]:
    found = []
    for name, version, least in (
        ("torch", torch.__version__, MIN_TORCH),
        ("triton", version_of("triton"), MIN_TRITON),
    ):
        numbers = re.match(r"(\d+)\.(\d+)", version or "")
        if numbers is not None and tuple(map(int, numbers.groups())) < least:
            wanted = ".".join(map(str, least))
            found.append(f"{name} {version} is older than {wanted}, with which nothing is tested")
    return found


def _cpu_warnings() -> list[str]:
    found = []
    path, because = cpu_path(torch.float32)
    is_compiled = path == "compiled C loops"
    if not is_compiled:
        found.append(
            f"CPU: {because}; ATen blocks take about 2.5 times as long to accumulate bf16 and 8.5 "
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
    if is_compiled and openmp.runtime() is None and threads > 1:
        found.append(
            "CPU: torch's OpenMP runtime (libgomp) was not found; the compiled loops run on one "
            f"thread of {threads}"
        )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" and _is_busy():
        found.append(
            "CPU: OMP_WAIT_POLICY=ACTIVE on a machine with other work to do: threads spin and keep "
            "cores from it; set it to PASSIVE"
        )
    return found


def _is_busy() -> bool:
    """Whether other processes take half of the cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * usable_cores()


def busy(device: torch.device) -> str | None:
    """A warning where other processes would decide what is measured: they take half of the cores,
    and nothing keeps torch's threads from waiting for them."""
    is_safe = device.type != "cpu" or "OMP_WAIT_POLICY" in os.environ
    if is_safe or not _is_busy():
        return None
    return (
        "this machine has other work to do: torch's threads wait for each other then, and native "
        "forms may be measured much too slow. Wait for a quiet moment, or set "
        "OMP_WAIT_POLICY=PASSIVE"
    )


def _gpu_warnings() -> list[str]:
    if not torch.cuda.is_available():
        if not driver():
            return []
        build = torch.version.cuda or torch.version.hip
        reason = f"is built for {build}, newer than the driver" if build else "is a CPU build"
        return [
            f"there is a GPU driver ({driver()}), but torch {torch.__version__} {reason}: "
            "the GPU is not used. See pytorch.org/get-started for the right build"
        ]
    found = [*filter(None, map(_gpu_warning, available()[1:]))]
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if not is_writable(cache):
        found.append(
            f"{cache} cannot be written: Triton needs it to keep compiled kernels; set "
            "TRITON_CACHE_DIR to a folder that can"
        )
    return found


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _gpu_warning(device: torch.device) -> str | None:
    """What one GPU is slow at, or cannot do."""
    name = f"{device} ({torch.cuda.get_device_name(device)})"
    backend, because = backends.why(None, device)
    if backend != "triton":
        return f"{name} takes slow ATen blocks: {because}"
    if torch.version.cuda is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    shown = ".".join(map(str, capability))
    if capability < MIN_CAPABILITY:
        return (
            f"{name} has compute capability {shown}, which Triton does not serve; pass "
            'backend="torch"'
        )
    is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    if capability < NATIVE_BF16_CAPABILITY or not is_native:
        return (
            f"{name}, of compute capability {shown}, emulates bf16: slow, and Triton supports GPUs "
            "from 8.0 on; prefer fp16 with a GradScaler, or fp32"
        )
    return None
