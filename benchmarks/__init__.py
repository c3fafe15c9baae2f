"""Benchmarks: what an update costs, beside every way stock PyTorch has of doing the same."""
