"""python -m tests.walk: walk for some time, and print what fails."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback

PATHS = ("compiled", "aten", "triton")


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--path", choices=PATHS, default="compiled")
    parser.add_argument("--only", help="the seed of one walk, as printed")
    parser.add_argument("--ignore", default="$^", help="regular expression of kinds not to print")
    args = parser.parse_args(argv)
    if args.path == "aten":
        os.environ["FUSEDACCUM_CC"] = "0"
    if args.path == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    if args.path == "triton":
        from tests import interpreter

        interpreter.install()
    from tests.walk.minimise import minimise
    from tests.walk.runner import draw, run

    backend = "triton" if args.path == "triton" else None
    counts: dict[str, int] = {}
    n_walks, end = 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        seed = args.only or f"{args.seed}/{n_walks}"
        n_walks += 1
        config, actions = draw(seed, backend)
        try:
            failure = run(config, actions)
            if failure and failure.kind not in counts and not re.search(args.ignore, failure.kind):
                shortest = minimise(config, actions, failure.kind)
                print(f"=== {args.path}, walk {seed}: {failure.kind}\n{shortest.script()}", flush=True)
        except Exception:
            print(f"=== {args.path}, walk {seed}: the walk itself failed")
            traceback.print_exc()
            return 2
        if failure is not None and not re.search(args.ignore, failure.kind):
            counts[failure.kind] = counts.get(failure.kind, 0) + 1
        if args.only:
            break
    print(f"{args.path}: {n_walks} walks, {sum(counts.values())} failed")
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:6} {kind}")
    return int(bool(counts))


if __name__ == "__main__":
    sys.exit(main())
