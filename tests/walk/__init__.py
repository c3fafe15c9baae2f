"""A random walk over the public API of `FusedAccumOptimizer`, with the README's promises as oracle.

    python -m tests.walk --seconds 600 --seed 1

`window.py` and `oracle.py` are the specification: what each call does to a window, in float64.
`update.py` has the parameters and the plain optimizer in float64, `numbers.py` the optimizers and
how far fp32 may be from float64, `slots.py` the parts. `actions.py` and `more_actions.py` draw the
calls; each is a line of Python that is run as it stands (`helpers.py` has what it calls), so that a
failure prints as a script of exactly what was run. `runner.py` runs a walk and compares after every
line; at the end a walk with resumes must have the bits of the same walk without them.
`minimise.py` deletes what a failure does not need.
"""
