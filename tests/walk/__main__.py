"""Walks for some time on every path that this machine's CPU has, and prints what fails.

Each failure is printed once for each kind, as a script that does the same again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

PATHS = ("compiled", "aten", "triton")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default="0")
    parser.add_argument(
        "--path", choices=PATHS, help="the compiled loops, ATen, or Triton's interpreter; else all"
    )
    parser.add_argument("--only", help="the seed of one walk, as printed; needs --path")
    parser.add_argument("--without", default="", help="actions to leave out: flush,load")
    parser.add_argument("--ignore", default="$^", help="regular expression of kinds not to print")
    args = parser.parse_args(argv)
    return walk(args) if args.path else spread(args)


def spread(args: argparse.Namespace) -> int:
    """All paths, over all cores: half of them the compiled loops, the others ATen, then Triton."""

    def use(core: int) -> int:
        shares = {"compiled": 1.0} if core % 2 == 0 else {"aten": 0.6, "triton": 0.4}
        return max(
            _run(args, path, share * args.seconds, f"{args.seed}.{core}")
            for path, share in shares.items()
        )

    n_cores = max(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_cores) as pool:
        return max(pool.map(use, range(n_cores)))


def _run(args: argparse.Namespace, path: str, seconds: float, seed: str) -> int:
    command = [sys.executable, "-m", "tests.walk", "--path", path, "--seconds", str(seconds)]
    command += ["--seed", seed, "--without", args.without, "--ignore", args.ignore]
    return int(subprocess.run(command, check=False).returncode != 0)


def walk(args: argparse.Namespace) -> int:
    """One path, in this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    if args.path == "aten":
        os.environ["FUSEDACCUM_CC"] = "0"
    import torch

    from tests import interpreter

    torch.set_num_threads(1)
    interpreter.install()
    from tests.walk.minimise import minimise
    from tests.walk.runner import draw, run

    counts: dict[str, int] = {}
    n_walks, end = 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        seed = args.only or f"{args.seed}/{n_walks}"
        n_walks += 1
        config, actions = draw(seed, "triton" if args.path == "triton" else None)
        actions = [action for action in actions if action.name not in args.without.split(",")]
        failure = run(config, actions)
        if failure is not None and not re.search(args.ignore, failure.kind):
            if failure.kind not in counts:
                script = minimise(config, actions, failure.kind).script(args.path)
                print(f"=== {args.path}, walk {seed}: {failure.kind}\n{script}", flush=True)
            counts[failure.kind] = counts.get(failure.kind, 0) + 1
        if args.only:
            break
    print(f"{args.path}: {n_walks} walks, {sum(counts.values())} failed")
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:6} {kind}", flush=True)
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
