"""docs/gallery.md: what the examples print on a machine, and the pictures they draw.

    python -m tests.gallery              run all, some minutes, and write the page (make gallery)
    python -m tests.gallery resume lora  run these anew and keep the rest of the page

Nothing on the page is typed by hand: a section is the output of one run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gallery.md"
# What to run, and where the picture it draws is kept.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "finetune": ((sys.executable,), "demo.png"),
    "token_weights": ((sys.executable,), "token_weights.png"),
    "resume": ((sys.executable,), None),
    "lora": ((sys.executable,), None),
    "trainer": ((sys.executable,), None),
    "accelerate_loop": ((sys.executable,), None),
    "lightning_module": ((sys.executable,), None),
    "ddp": (TORCHRUN, None),
    "fsdp2": (TORCHRUN, None),
    "custom_rule": ((sys.executable,), None),
}
HEAD = """# Gallery

This page shows what the [examples](examples.md) print, and the pictures they draw. It is made by
`python -m tests.gallery`, which runs each of them; nothing is typed by hand. All of it ran on CPUs.
"""
# Of a run and not of what it shows: where files went, and how long it took on a busy machine.
NOISE = re.compile(r"^(picture|numbers): |s in all$|Setting OMP_NUM_THREADS|^\*+$|^[WI]\d{4} ")

TIMES = re.compile(r",? in [0-9.]+ s(?=;|$)|'\w+_(?:time|runtime|per_second)': '[^']*',? ?")


def command(name: str) -> tuple[str, ...]:
    """As a reader types it."""
    run, _ = EXAMPLES[name]
    shown = "python" if run == (sys.executable,) else "torchrun --nproc-per-node 2"
    return (*shown.split(), f"examples/{name}.py")


def cleaned(output: str) -> str:
    """What an example printed, without progress bars, warnings of others, paths and times."""
    lines = [line.split("\r")[-1].rstrip() for line in output.split("\n")]
    kept = [TIMES.sub("", line) for line in lines if not NOISE.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")


def section(name: str, output: str, about: str) -> str:
    """The part of the page for one example."""
    _, picture = EXAMPLES[name]
    shown = f"\n![The picture that the example draws]({picture})\n" if picture else ""
    typed = f"`{' '.join(command(name))}`"
    head = f"## {name}\n\n{typed} ([text](../examples/{name}.py)) printed this on\n{about}:"
    return f"{head}\n\n```text\n{output}\n```\n{shown}"


def about_here() -> str:
    import torch

    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    cpu = re.sub(r"\s+", " ", found[1]) if found else platform.machine()
    return f"{date.today()}, {cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


def run(name: str) -> str:
    """Run an example as a reader does, and keep its picture.

    Raises:
        CalledProcessError: if it failed.
    """
    start, picture = EXAMPLES[name]
    # Threads that wait must not spin, where the machine has other work.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OUT", None)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*start, str(ROOT / "examples" / f"{name}.py")],
            cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        if picture is not None:
            (drawn,) = Path(folder, "out").glob("*.png")
            shutil.copyfile(drawn, ROOT / "docs" / picture)
    return cleaned(done.stdout)


def main(names: list[str]) -> None:
    old = PAGE.read_text("utf-8") if PAGE.exists() else ""
    sections = dict(re.findall(r"^(?=## (\w+)$)(.*?)(?=^## |\Z)", old, re.M | re.S))
    about = about_here()
    for name in names or EXAMPLES:
        print(name, flush=True)
        sections[name] = section(name, run(name), about)
        whole = [sections[n].rstrip("\n") for n in EXAMPLES if n in sections]
        PAGE.write_text("\n\n".join([HEAD.rstrip("\n"), *whole]) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
