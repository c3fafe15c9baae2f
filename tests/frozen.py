"""Importing it takes what is there by now from Python's collector.

That is half a million objects once torch is imported, more with frameworks, none of them garbage.
Each of the collector's passes went through all of them, and so does the search for engines
(fusedaccum/window/watch.py). That search would take back what is frozen, so `gc.unfreeze` does
nothing from now on: no test has a model by now. `unfreeze` is the real one.
"""

from __future__ import annotations

import gc

unfreeze = gc.unfreeze

gc.collect()
gc.freeze()
gc.unfreeze = lambda: None  # type: ignore[assignment]
