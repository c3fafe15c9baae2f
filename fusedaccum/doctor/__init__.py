"""`python -m fusedaccum doctor`: is everything here as it should be?"""
