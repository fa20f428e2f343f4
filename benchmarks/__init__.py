"""Microbenchmarks of the kernels, whole steps, and the report made of their rows."""
