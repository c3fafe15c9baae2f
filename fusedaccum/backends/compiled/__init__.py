"""Loops for the CPU, made from the kernels' text and compiled once a machine."""
