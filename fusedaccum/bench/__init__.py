"""`python -m fusedaccum bench`: what a window costs here."""
