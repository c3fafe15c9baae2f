"""Importing it takes what is there by now from Python's collector.

That is half a million objects once torch is imported, more with frameworks, none of them garbage.
Each of the collector's passes went through all of them, and so does the search for engines
(fusedaccum/window/watch.py). That search would take back what is frozen, and to ask how much there
is costs as much as to look through it. So from now on nothing is frozen for those who ask: no test
has a model by now. What is patched here is the real one in `REAL`.
"""

from __future__ import annotations

import gc

REAL = {"get_freeze_count": gc.get_freeze_count, "unfreeze": gc.unfreeze}

gc.collect()
gc.freeze()
gc.get_freeze_count = lambda: 0  # type: ignore[assignment]
gc.unfreeze = lambda: None  # type: ignore[assignment]
