"""What `python -m fusedaccum` runs: `doctor` and `bench`. Nothing of the library imports this."""
