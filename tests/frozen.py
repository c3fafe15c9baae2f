"""Importing it takes what is there by now from Python's collector.

That is half a million objects once torch is imported, more with frameworks, none of them garbage.
Each of the collector's passes went through all of them, and so does the search for engines
(fusedaccum/window/watch.py), which no longer sees what is frozen: no test has a model by now.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
